# nbdthin's own attach and mount, by the kernel's driver: a mounted ext4 that is written and synced without a pause while
# the server is restarted, the watcher killed, and the volume grown; then an attach that dies half way.
. /guestlib.sh

URI=nbd://$NBD_HOST:$NBD_PORT

# One process runs all verbs: under TCG, each start of Python would take seconds. Requests are sent again after 3 seconds
# instead of 10. `die STEP URI` is an attach that dies before it saves its state for the STEPth time: before the second,
# the kernel has made a device, and nobody has heard which.
mkfifo /tmp/verbs /tmp/statuses
python3 -c '
import itertools, os, sys
from nbdthin import cli, devices
from nbdthin.devices import kernel

def die(step, uri):
    steps = itertools.count(1)
    sys.addaudithook(lambda event, _: event == "os.rename" and next(steps) == step and os._exit(9))
    devices.attach_uri(uri)

kernel.REQUEST_TIMEOUT = 3
with open("/tmp/statuses", "w", buffering=1) as statuses:
    for line in open("/tmp/verbs"):
        words = line.split()
        if words[0] != "die":
            status = cli.main(words)
        elif not (child := os.fork()):
            die(int(words[1]), words[2])
        else:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=statuses)
' &
exec 9</tmp/statuses 8>/tmp/verbs

nbdthin() {
    echo "$*" >&8
    read -r _status <&9
    return "$_status"
}

watcher() { ps -o pid,args | grep '[w]atch.main' | { read -r pid _ && echo "$pid"; }; }

is_size() { [ "$(cat /sys/block/nbd0/size)" = "$1" ]; }
is_free() { [ ! -e "/sys/block/$1/pid" ]; }
nothing_left() { [ "$(ls /run/nbdthin)" = "lock
watcher" ]; }

step start-workers start_workers disk
step attach nbdthin attach $URI/disk
[ "$(ls /sys/block/nbd0/mq | wc -l)" = 4 ] || fail "not four connections"
[ "$(cat /sys/block/nbd0/queue/write_cache)" = "write back" ] || fail "the kernel sends no FLUSH"
step format mkfs.ext4 -q -F /dev/nbd0
refused attach-again nbdthin attach --read-only $URI/disk
step detach nbdthin detach disk
is_free nbd0 || fail "the device is not free"

step mount nbdthin mount $URI/disk /mnt -o noatime
refused detach-mounted nbdthin detach disk
start_writing /mnt
step begin goes_on
for ending in SIGTERM SIGKILL; do
    step $ending host $ending
    step after-$ending goes_on
done
step kill-watcher kill -9 "$(watcher)"
step cleanup nbdthin attach --cleanup
until_true watcher >/dev/null || fail "no new watcher"
step SIGKILL host SIGKILL
step after-SIGKILL goes_on
step grow host resize disk 512M
step grown until_true is_size 1048576
step resize resize2fs /dev/nbd0
step stop stop_writing
step umount nbdthin umount /mnt
step SIGKILL-behind host SIGKILL

step attach-read-only nbdthin attach --read-only $URI/disk
[ "$(cat /sys/block/nbd0/ro)" = 1 ] || fail "it can be written"
step check e2fsck -fn /dev/nbd0
step mount-again mount -t ext4 -o ro,noload /dev/nbd0 /mnt
step read sha256sum -c -s /tmp/SUMS
step umount-again umount /mnt
step detach-again nbdthin detach /dev/nbd0
dmesg | grep -E "I/O error|EXT4-fs (error|warning)" && fail "the kernel met an error"

for number in 1 2 3; do
    refused die-$number nbdthin die $number $URI/disk
    [ $number = 1 ] || { is_free nbd0 && fail "there is no device to clean up"; }
    step mend-$number nbdthin attach --cleanup
    is_free nbd0 || fail "the device is not free"
    nothing_left || fail "not all is gone: $(ls -R /run/nbdthin)"
done
no_watcher() { ! watcher >/dev/null; }
step watcher-ends until_true no_watcher
