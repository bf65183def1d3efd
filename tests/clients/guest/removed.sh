# An ext4 that is mounted by nbdthin while its volume is removed, its name given to a larger one, and the server killed: the
# device stays what it was, as it knows its volume by the lasting name.
. /guestlib.sh

URI=nbd://$NBD_HOST:$NBD_PORT

nbdthin() { python3 -m nbdthin "$@"; }
is_size() { [ "$(cat /sys/block/nbd0/size)" = "$1" ]; }
write() { dd if=/dev/urandom of=/mnt/$1 bs=64k count=16 conv=fsync 2>/dev/null && sha256sum /mnt/$1 >> /tmp/SUMS; }

step start-workers start_workers disk
step attach nbdthin attach "$URI/$LASTING"
step format mkfs.ext4 -q -F /dev/nbd0
step mount mount -t ext4 /dev/nbd0 /mnt
step write write before
step remove host rm --deferred disk
step use-again host create disk 512M
step write-on write removed
sleep 6 # the watcher asks for the size every 5 seconds
is_size 524288 || fail "it has the size of what has its name now"
step SIGKILL host SIGKILL
step write-after write killed
sleep 6
is_size 524288 || fail "it has the size of what has its name now"
step umount umount /mnt
step check e2fsck -fn /dev/nbd0
step mount-again mount -t ext4 -o ro /dev/nbd0 /mnt
step read sha256sum -c -s /tmp/SUMS
step umount-again umount /mnt
step detach nbdthin detach /dev/nbd0
dmesg | grep -E "I/O error|EXT4-fs (error|warning)" && fail "the kernel met an error"
true
