# The life of a disk: attached over four connections, formatted, filled, trimmed, snapshotted from outside while it
# is written, checked; then the same of the snapshot and of a clone of it. KIND is the file system.
. /guestlib.sh

case $KIND in
    ext4) format="mkfs.ext4 -q -F" check="e2fsck -fn" beside=rw untouched=ro,noload;;
    xfs) format="mkfs.xfs -q -f" check="xfs_repair -n" beside=nouuid untouched=ro,nouuid,norecovery;;
esac

step start-workers start_workers disk
step attach attach nbd0 disk -C 4 -b "$BLOCK_SIZE"
[ "$(ls /sys/block/nbd0/mq | wc -l)" = 4 ] || fail "not four connections"
[ "$(cat /sys/block/nbd0/queue/write_cache)" = "write back" ] || fail "the kernel sends no FLUSH"
[ "$(cat /sys/block/nbd0/queue/fua)" = 1 ] || fail "the kernel sends no FUA"
[ "$(cat /sys/block/nbd0/queue/logical_block_size)" = "$BLOCK_SIZE" ] || fail "block size"

step format $format /dev/nbd0
step mount mount -t "$KIND" /dev/nbd0 /mnt
step write make_files /mnt/kept 8 512
step write-more dd if=/dev/zero of=/mnt/dropped bs=1M count=48 conv=fsync
drop_caches
step read check_files /mnt/kept
step weigh host info --json
step remove rm /mnt/dropped
# Mounted again: ext4 trims only what its journal has let go of, xfs frees what was removed in the background.
step umount-removed umount /mnt
step mount-removed mount -t "$KIND" /dev/nbd0 /mnt
step fstrim fstrim -v /mnt
step flush dd if=/dev/zero of=/mnt/flushed bs=4k count=1 conv=fsync
step weigh host info --json

(
    number=0
    while [ ! -e /tmp/enough ]; do
        dd if=/dev/urandom of=/mnt/load$((number % 8)) bs=64k count=8 conv=fsync 2>/dev/null || touch /tmp/load-failed
        number=$((number + 1))
        [ $number = 4 ] && touch /tmp/loaded
    done
) &
while [ ! -e /tmp/loaded ]; do usleep 50000; done
step snapshot host snapshot disk disk@load
touch /tmp/enough
wait
[ -e /tmp/load-failed ] && fail "writing during the snapshot"
step read-again check_files /mnt/kept
step umount umount /mnt
step check $check /dev/nbd0
step mount-again mount -t "$KIND" /dev/nbd0 /mnt
drop_caches
step read-after-mount check_files /mnt/kept

mkdir /tmp/clone
step clone host clone disk@load clone
step attach-clone attach nbd1 clone -b "$BLOCK_SIZE"
step mount-clone mount -t "$KIND" -o $beside /dev/nbd1 /tmp/clone
step read-clone check_files /tmp/clone/kept
[ -e /tmp/clone/load0 ] || fail "the clone has nothing of the load"
step write-clone make_files /tmp/clone/own 2 512
step umount-clone umount /tmp/clone
step check-clone $check /dev/nbd1
[ -e /mnt/own ] && fail "what was written to the clone is in the volume"

step attach-snapshot attach nbd2 disk@load -b "$BLOCK_SIZE"
[ "$(cat /sys/block/nbd2/ro)" = 1 ] || fail "the snapshot can be written"
refused write-snapshot dd if=/dev/zero of=/dev/nbd2 bs=4096 count=1
step mount-snapshot mount -t "$KIND" -o $untouched /dev/nbd2 /tmp/clone
step read-snapshot check_files /tmp/clone/kept
step umount-snapshot umount /tmp/clone

refused remove-in-use host rm disk
step umount-disk umount /mnt
dmesg | grep "Connection timed out" && fail "a request was not answered"
for device in nbd0 nbd1 nbd2; do step detach-$device detach $device; done
