"""The daemon under real clients: libnbd's tools, QEMU's, fio, and kernels with file systems. Nothing is imitated."""
