# A dm-thin pool on /dev/vda (metadata) and /dev/vdb (data), in Docker's shape and with what else it can hold. Prints
# for each device that is left its number, its size in bytes and the checksum of all of it. SECTORS is the block size.
. /guestlib.sh
export DM_DISABLE_UDEV=1

message() { dmsetup message pool 0 "$*"; }
activate() { dmsetup create "thin$1" --table "0 $2 thin /dev/mapper/pool $1"; }
# snapshot ORIGIN NUMBER SECTORS
snapshot() {
    dmsetup suspend "thin$1" && message create_snap "$2" "$1" && dmsetup resume "thin$1" && activate "$2" "$3"
}
# change NUMBER COMMAND...: in the mounted file system of a device
change() {
    mount -t ext4 "/dev/mapper/thin$1" /mnt && shift && (cd /mnt && "$@") && umount /mnt
}
# scatter NUMBER FIRST STEP: 4 KiB of noise in every STEPth 64 KiB
scatter() {
    _block=$2
    while [ "$_block" -lt 200 ]; do
        dd if=/dev/urandom of="/dev/mapper/thin$1" bs=4k count=1 seek=$((_block * 16)) conv=notrunc 2>/dev/null || return 1
        _block=$((_block + $3))
    done
    sync
}
summed() {
    for _device in /dev/mapper/thin*; do
        _number=${_device#/dev/mapper/thin}
        echo "@@ SUM $_number $(blockdev --getsize64 "$_device") $(sha256sum < "$_device" | cut -d" " -f1)"
    done
}

modprobe virtio_blk && modprobe dm_thin_pool || fail "modules"
SIZE=65536   # sectors of a device: 32 MiB
step pool dmsetup create pool --table "0 $(blockdev --getsz /dev/vdb) thin-pool /dev/vda /dev/vdb $SECTORS 0 1 skip_block_zeroing"

# Base, image, containers; the image's lower layer is deleted when others stand on it.
step base message create_thin 1
step activate-base activate 1 $SIZE
step format mkfs.ext4 -q -F -E nodiscard /dev/mapper/thin1
step layer snapshot 1 2 $SIZE
step fill-layer change 2 make_files lower 12 512
step upper snapshot 2 3 $SIZE
step fill-upper change 3 make_files upper 6 256
step remove-in-upper change 3 rm -r lower/f3 lower/f4 lower/f5
step container snapshot 3 4 $SIZE
step larger-container snapshot 3 5 $((SIZE * 2))
step use-container change 4 make_files own 3 300
step use-larger change 5 make_files own 3 300
step trim change 4 fstrim -v .
step close-layer dmsetup remove thin2
step delete-layer message delete 2
step use-base change 1 make_files late 2 100

# Snapshots along the life of a device without a file system, and a snapshot of one of them that lives on itself.
step raw message create_thin 20
step activate-raw activate 20 $SIZE
step scatter scatter 20 0 2
step first snapshot 20 21 $SIZE
step overwrite scatter 20 0 6
step second snapshot 20 22 $SIZE
step overwrite-again scatter 20 1 4
step zero dd if=/dev/zero of=/dev/mapper/thin20 bs=1M count=1 conv=notrunc,fsync
step of-first snapshot 21 23 $SIZE
step overwrite-snapshot scatter 23 4 10
step of-that snapshot 23 24 $SIZE
step overwrite-its-origin scatter 23 8 20
step discard blkdiscard -o 2097152 -l 4194304 /dev/mapper/thin24

step independent message create_thin 16777215
step activate-independent activate 16777215 $((SIZE / 2))
step scatter-independent scatter 16777215 3 7
step empty message create_thin 30

drop_caches
summed
dmsetup status pool
step keep-metadata message reserve_metadata_snap
for device in /dev/mapper/thin*; do step close dmsetup remove "${device#/dev/mapper/}"; done
step close-pool dmsetup remove pool
