#!/bin/bash
# Build the guest of run.sh once: Debian's cloud kernel, unpacked and not installed, and an initramfs with
# busybox, nbd-client, dmsetup and the tools of ext4 and xfs. Prints nothing when it works; a second call returns at
# once.
#
#   build.sh [--force]          the files land in $VMTEST_CACHE, by default ~/.cache/nbdthin-vm
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${VMTEST_CACHE:-$HOME/.cache/nbdthin-vm}
meta=linux-image-cloud-amd64   # a metapackage: it depends on the real image
programs=(nbd-client mkfs.ext4 e2fsck mkfs.xfs xfs_repair dmsetup)
modules=(virtio_pci virtio_net virtio_console virtio_blk nbd ext4 xfs crc32c_generic dm_thin_pool)
export PATH=$PATH:/usr/sbin:/sbin

die() { echo "build.sh: $*" >&2; exit 3; }
for program in qemu-system-x86_64 busybox gcc cpio depmod modprobe "${programs[@]}"; do
    command -v "$program" >/dev/null || die "missing $program: tools/test lists the packages"
done
mkdir -p "$cache"
force=${1:-}

# ---- the kernel ------------------------------------------------------------------------------------
image() { apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)/\1/p' | sed -n 1p; }

fetch_kernel() {
    local package folder
    package=$(image)
    [ -n "$package" ] || { apt-get update -qq; package=$(image); }
    [ -n "$package" ] || die "apt knows no $meta"
    folder=$(mktemp -d "$cache/download.XXXX"); chmod 755 "$folder"
    # An index older than the mirror names a file that is gone: refresh it once.
    (cd "$folder" && { apt-get download -qq "$package" 2>/dev/null || { apt-get update -qq; apt-get download -qq "$package"; }; })
    rm -rf "$cache/k" "$cache/kver"
    dpkg -x "$folder"/linux-image-*.deb "$cache/k"
    rm -rf "$folder"
    for file in "$cache"/k/boot/vmlinuz-*; do basename "${file#*vmlinuz-}" > "$cache/kver"; done
}

[ -s "$cache/kver" ] && [ -e "$cache/k/boot/vmlinuz-$(cat "$cache/kver")" ] || fetch_kernel
kernel=$(cat "$cache/kver")

# ---- the initramfs ---------------------------------------------------------------------------------
stamp=$(cat "$here/build.sh" "$here/init" "$here/guestlib.sh" "$here/nbdattach.c" | sha256sum | cut -c1-16)-$kernel
[ "$force" != --force ] && [ -s "$cache/guest.cpio" ] && [ "$(cat "$cache/guest.stamp" 2>/dev/null)" = "$stamp" ] && exit 0

root=$(mktemp -d "$cache/root.XXXX")
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{bin,sbin,proc,sys,dev,tmp,run,mnt,etc,usr,root}
ln -s ../bin "$root/usr/bin"; ln -s ../sbin "$root/usr/sbin"

put() { mkdir -p "$root$(dirname "$1")"; cp -L "$1" "$root$1"; }

cp -L "$(command -v busybox)" "$root/bin/busybox"
"$root/bin/busybox" --list | while read -r applet; do [ "$applet" = busybox ] || ln -sf busybox "$root/bin/$applet"; done
ln -s ../bin/busybox "$root/sbin/modprobe"   # where the kernel looks for it
for program in "${programs[@]}"; do
    path=$(command -v "$program")
    cp -L "$path" "$root/bin/$program"
    ldd "$path" | grep -oE '/[^ ]+' | while read -r library; do put "$library"; done
done
# glibc opens it at run time, for pthread_cancel in xfs_repair.
put "$(ldconfig -p | awk '/libgcc_s.so.1.*x86-64/ && !n++ {print $NF}')"

depmod -b "$cache/k" "$kernel"
modprobe -d "$cache/k" -S "$kernel" -a --show-depends "${modules[@]}" | sed -n 's/^insmod \([^ ]*\).*/\1/p' | sort -u |
while read -r module; do
    copy=$root${module#"$cache/k"}
    mkdir -p "$(dirname "$copy")"
    case $module in *.xz) unxz < "$module" > "${copy%.xz}";; *) cp "$module" "$copy";; esac
done
cp "$cache/k/lib/modules/$kernel"/modules.{builtin,order} "$root/lib/modules/$kernel/"
busybox depmod -b "$root" "$kernel"

gcc -std=gnu11 -O2 -Wall -static -o "$root/bin/nbdattach" "$here/nbdattach.c"
install -m 755 "$here/init" "$root/init"
cp "$here/guestlib.sh" "$root/guestlib.sh"
echo 'root::0:0:root:/root:/bin/sh' > "$root/etc/passwd"
ln -s /proc/mounts "$root/etc/mtab"
# Not compressed: under TCG that boots fastest.
(cd "$root" && find . -mindepth 1 | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet) > "$cache/guest.cpio.new"
mv "$cache/guest.cpio.new" "$cache/guest.cpio"
echo "$stamp" > "$cache/guest.stamp"
