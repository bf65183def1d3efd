# A mounted ext4 that is written and synced without a pause, while the server is restarted again and again, by SIGTERM and
# by SIGKILL. CONNECTIONS is how many the device has.
. /guestlib.sh

step start-workers start_workers disk
step attach attach_for_good 0 disk "$CONNECTIONS"
step format mkfs.ext4 -q -F /dev/nbd0
step mount mount -t ext4 /dev/nbd0 /mnt
start_writing /mnt
for ending in SIGTERM SIGKILL SIGKILL SIGTERM SIGKILL SIGTERM; do
    step before-$ending goes_on
    step $ending host $ending
    step after-$ending goes_on
done
step stop stop_writing
drop_caches
step read sha256sum -c -s /tmp/SUMS
step umount umount /mnt
step check e2fsck -fn /dev/nbd0
step mount-again mount -t ext4 -o ro /dev/nbd0 /mnt
step read-again sha256sum -c -s /tmp/SUMS
step umount-again umount /mnt
dmesg | grep -E "I/O error|EXT4-fs (error|warning)" && fail "the kernel met an error"
step detach detach nbd0
