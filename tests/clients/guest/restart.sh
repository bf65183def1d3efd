# A mounted ext4 that is written and synced without a pause, while the server is restarted again and again, by SIGTERM and
# by SIGKILL. CONNECTIONS is how many the device has.
. /guestlib.sh

files() { cat /tmp/files 2>/dev/null || echo 0; }

# goes_on: wait until three more files have been written and synced.
goes_on() {
    _target=$(($(files) + 3)) _tries=0
    while [ "$(files)" -lt $_target ]; do
        [ -e /tmp/failed ] && return 1
        _tries=$((_tries + 1)); [ $_tries -gt 1200 ] && return 1
        usleep 50000
    done
}

step start-workers start_workers disk
step attach attach_for_good 0 disk "$CONNECTIONS"
step format mkfs.ext4 -q -F /dev/nbd0
step mount mount -t ext4 /dev/nbd0 /mnt
(
    number=0
    while [ ! -e /tmp/enough ]; do
        dd if=/dev/urandom of=/mnt/f$number bs=64k count=2 conv=fsync 2>/dev/null && sum=$(sha256sum /mnt/f$number) ||
            { touch /tmp/failed; exit 1; }
        echo "$sum" >> /tmp/SUMS
        number=$((number + 1))
        echo $number > /tmp/files.new && mv /tmp/files.new /tmp/files
    done
) &
for ending in SIGTERM SIGKILL SIGKILL SIGTERM SIGKILL SIGTERM; do
    step before-$ending goes_on
    step $ending host $ending
    step after-$ending goes_on
done
touch /tmp/enough
wait $!
[ -e /tmp/failed ] && fail "a write or a sync failed"
drop_caches
step read sha256sum -c -s /tmp/SUMS
step umount umount /mnt
step check e2fsck -fn /dev/nbd0
step mount-again mount -t ext4 -o ro /dev/nbd0 /mnt
step read-again sha256sum -c -s /tmp/SUMS
step umount-again umount /mnt
dmesg | grep -E "I/O error|EXT4-fs (error|warning)" && fail "the kernel met an error"
step detach detach nbd0
