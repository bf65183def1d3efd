# What guest scripts are written in: `. /guestlib.sh`. POSIX sh of busybox. NBD_HOST and NBD_PORT say where the server is.

fail() { echo "@@ FAIL $*"; exit 1; }

# step NAME COMMAND...: run it and end the guest if it fails.
step() {
    _name=$1; shift
    "$@" || fail "$_name: $* (status $?)"
    echo "@@ $(cut -d" " -f1 /proc/uptime) $_name"
}

# refused NAME COMMAND...: the command must fail.
refused() {
    _name=$1; shift
    if "$@"; then fail "$_name succeeded: $*"; fi
    echo "@@ $(cut -d" " -f1 /proc/uptime) $_name"
}

# attach DEVICE EXPORT [OPTIONS of nbd-client]
attach() {
    _device=$1 _export=$2; shift 2
    nbd-client "$NBD_HOST" "$NBD_PORT" "/dev/$_device" -N "$_export" "$@" || return 1
    _tries=0
    while [ "$(cat "/sys/block/$_device/size")" = 0 ]; do
        _tries=$((_tries + 1)); [ $_tries -gt 600 ] && return 1
        usleep 50000
    done
}

# attach_for_good NUMBER EXPORT CONNECTIONS: nbdNUMBER reconnects when its server is restarted. A request is sent again
# after 5 seconds without an answer, and waits a minute for a server.
attach_for_good() { nbdattach "$NBD_HOST" "$NBD_PORT" "$2" "$1" "$3" 5 60; }

# detach DEVICE, and wait until the kernel has let go of it
detach() {
    nbd-client -d "/dev/$1" >/dev/null || return 1
    _tries=0
    while [ -e "/sys/block/$1/pid" ]; do
        _tries=$((_tries + 1)); [ $_tries -gt 600 ] && return 1
        usleep 50000
    done
}

# start_workers EXPORT: to be done before attaching with -C.
# The kernel receives each connection's replies in a work item that lasts as long as the connection. When starting one
# more kernel worker takes longer than 10 ms, which it may under TCG, the queue's one rescuer takes all items that
# wait, and every connection but the first is deaf until its requests time out (seen with 6.1). Devices with one
# connection each cannot get into that; the workers that they leave behind idle for five minutes.
start_workers() {
    for _number in 2 3 4 5 6 7; do attach nbd$_number "$1" >/dev/null || return 1; done
    for _number in 2 3 4 5 6 7; do detach nbd$_number || return 1; done
}

# until_true COMMAND...: wait for it
until_true() {
    _tries=0
    until "$@"; do
        _tries=$((_tries + 1)); [ $_tries -gt 1200 ] && return 1
        usleep 50000
    done
}

# start_writing FOLDER: write and sync file after file, without a pause, until `stop_writing`; their sums are in
# /tmp/SUMS. Both `goes_on`, which waits until three more have been written, and `stop_writing` fail when one could not be.
start_writing() {
    (
        _number=0
        while [ ! -e /tmp/enough ]; do
            dd if=/dev/urandom of="$1/f$_number" bs=64k count=2 conv=fsync 2>/dev/null &&
                _sum=$(sha256sum "$1/f$_number") || { touch /tmp/failed; exit 1; }
            echo "$_sum" >> /tmp/SUMS
            _number=$((_number + 1))
            echo $_number > /tmp/files.new && mv /tmp/files.new /tmp/files
        done
    ) &
    _writer=$!
}
stop_writing() { touch /tmp/enough; wait "$_writer"; [ ! -e /tmp/failed ]; }
goes_on() { until_true _wrote $(($(_files) + 3)) && [ ! -e /tmp/failed ]; }
_files() { cat /tmp/files 2>/dev/null || echo 0; }
_wrote() { [ -e /tmp/failed ] || [ "$(_files)" -ge "$1" ]; }

# host WORDS...: have run.sh's --hook do something out there; its exit status comes back
host() {
    [ -n "$_host" ] || { exec 7<>/dev/virtio-ports/hook; _host=1; }
    echo "$*" >&7
    read -r _status <&7
    return "$_status"
}

# make_files FOLDER COUNT KIB: random files and their sums.   check_files FOLDER: compare.
make_files() {
    mkdir -p "$1"
    _file=0
    while [ $_file -lt "$2" ]; do
        dd if=/dev/urandom of="$1/f$_file" bs=1024 count="$3" 2>/dev/null || return 1
        _file=$((_file + 1))
    done
    (cd "$1" && sha256sum f* > SUMS) && sync
}
check_files() { (cd "$1" && sha256sum -c SUMS > /tmp/sums 2>&1) || { grep -v OK /tmp/sums; return 1; }; }
drop_caches() { sync; echo 3 > /proc/sys/vm/drop_caches; }
