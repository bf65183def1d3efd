#!/bin/bash
# Build the guest of run.sh once: Debian's cloud kernel, unpacked and not installed, and an initramfs with
# busybox, nbd-client and the tools of ext4 and xfs. Prints nothing when it works; a second call returns at once.
#
#   build.sh [--force] [--python PROGRAM]       the files land in $VMTEST_CACHE, by default ~/.cache/nbdthin-vm
#
# With --python also an archive of that Python and of this checkout's nbdthin, to be unpacked behind the initramfs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${VMTEST_CACHE:-$HOME/.cache/nbdthin-vm}
meta=linux-image-cloud-amd64   # a metapackage: it depends on the real image
programs=(nbd-client mkfs.ext4 e2fsck resize2fs mkfs.xfs xfs_repair)
modules=(virtio_pci virtio_net virtio_console nbd ext4 xfs crc32c_generic)
export PATH=$PATH:/usr/sbin:/sbin

die() { echo "build.sh: $*" >&2; exit 3; }
for program in qemu-system-x86_64 busybox gcc cpio depmod modprobe "${programs[@]}"; do
    command -v "$program" >/dev/null || die "missing $program: tools/test lists the packages"
done
mkdir -p "$cache"
force=no python=''
while [ $# -gt 0 ]; do
    case $1 in
        --force) force=yes; shift;;
        --python) python=$2; shift 2;;
        *) die "unknown option $1";;
    esac
done

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
is_fresh() { [ $force = no ] && [ -s "$cache/$1.cpio" ] && [ "$(cat "$cache/$1.stamp" 2>/dev/null)" = "$2" ]; }

# pack NAME STAMP: what is in $root becomes an archive. Not compressed: under TCG that boots fastest.
pack() {
    (cd "$root" && find . -mindepth 1 | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet) > "$cache/$1.cpio.$$"
    mv "$cache/$1.cpio.$$" "$cache/$1.cpio"
    echo "$2" > "$cache/$1.stamp"
}

root=$(mktemp -d "$cache/root.XXXX")
trap 'rm -rf "$root"' EXIT

# ---- Python ----------------------------------------------------------------------------------------
if [ -n "$python" ]; then
    top=$here/../..
    python_stamp=$(cd "$top" && { echo "$python"; "$python" -VV; "$python" -m pip list 2>/dev/null
        find nbdthin -name '*.py' -print0 | LC_ALL=C sort -z | xargs -0 cat tools/vm/python.py; } | sha256sum | cut -c1-16)
    if ! is_fresh python "$python_stamp"; then
        "$python" "$here/python.py" "$root" > "$root/python.env"
        pack python "$python_stamp"
        rm -r "$root"; mkdir "$root"
    fi
fi

is_fresh guest "$stamp" && exit 0
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
pack guest "$stamp"
