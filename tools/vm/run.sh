#!/bin/bash
# Boot a guest in QEMU, without KVM, whose kernel has the nbd driver, and run a script in it against an NBD server
# on 127.0.0.1 of this machine.
#
#   run.sh [options] PORT GUEST_SCRIPT
#
#   -c CPUS       the guest's processors (4): blk-mq sends through as many connections as there are processors
#   -m MIB        the guest's memory (512)
#   -t SECONDS    end a guest that hangs (300)
#   --hook CMD    the guest's `host WORDS` runs "CMD WORDS" here; its status goes back into the guest
#   --env K=V     a variable for the guest script
#   --python PROGRAM   the guest has this Python, and the nbdthin of this checkout
#
# Exit status: the guest script's; 124 when its time is up, 125 when the guest died, 126 when QEMU failed, 2 or 3
# when it could not begin. The console goes to stdout; lines of the test bed itself begin with @@.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${VMTEST_CACHE:-$HOME/.cache/nbdthin-vm}
cpus=4 memory=512 seconds=300 hook='' variables=() python=()
die() { echo "run.sh: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        -c) cpus=$2; shift 2;;
        -m) memory=$2; shift 2;;
        -t) seconds=$2; shift 2;;
        --hook) hook=$2; shift 2;;
        --python) python=(--python "$2"); shift 2;;
        --env) variables+=("$2"); shift 2;;
        -*) die "unknown option $1";;
        *) break;;
    esac
done
[ $# = 2 ] || die "usage: run.sh [options] PORT GUEST_SCRIPT"
port=$1 script=$2
[ -f "$script" ] || die "no guest script $script"
"$here/build.sh" ${python[@]+"${python[@]}"} || exit 3

work=$(mktemp -d /tmp/nbdthin-vm.XXXXXX) qemu='' hooks=''
cleanup() {
    [ -n "$qemu" ] && kill "$qemu" 2>/dev/null
    [ -n "$hooks" ] && kill "$hooks" 2>/dev/null
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# ---- this run's initramfs: the script and its environment behind the cached one
mkdir "$work/root"
cp "$script" "$work/root/guest.sh"
{
    echo "export NBD_HOST=10.0.2.2 NBD_PORT=$port"   # QEMU's user network: the host's loopback
    for variable in "${variables[@]}"; do printf 'export %s=%q\n' "${variable%%=*}" "${variable#*=}"; done
} > "$work/root/guest.env"
{ cat "$cache/guest.cpio" ${python[@]+"$cache/python.cpio"}; (cd "$work/root" && find . -mindepth 1 | cpio -o -H newc -R 0:0 --quiet); } > "$work/initrd"

# ---- QEMU. One thread for all processors: tests share two cores with the server, and a busy machine then slows the
# guest less. Without cx16, because with plain `-cpu max` 17 of 150 boots of kernel 6.12 crashed, and without it none.
arguments=(
    -accel tcg,thread=single,tb-size=256 -cpu max,cx16=off -M q35 -m "$memory" -smp "$cpus"
    -nodefaults -no-user-config -display none -monitor none -no-reboot
    -chardev stdio,id=console,signal=off -serial chardev:console
    -netdev user,id=net,ipv6=off -device virtio-net-pci,netdev=net,romfile=
    -device virtio-serial-pci
    -chardev "file,id=status,path=$work/status" -device virtserialport,chardev=status,name=status
    -kernel "$cache/k/boot/vmlinuz-$(cat "$cache/kver")" -initrd "$work/initrd"
    -append "console=ttyS0 loglevel=5 panic=-1 mitigations=off random.trust_cpu=on"
)
if [ -n "$hook" ]; then
    mkfifo "$work/hook.in" "$work/hook.out"
    arguments+=(-chardev "pipe,id=hook,path=$work/hook" -device virtserialport,chardev=hook,name=hook)
    # The words are split on purpose; stdin would be the fifo.
    # shellcheck disable=SC2086
    (exec 5<>"$work/hook.out" 6<>"$work/hook.in"
     while read -r -u5 words; do
         status=0; $hook $words </dev/null >"$work/answer" 2>&1 || status=$?
         sed "s/^/@@ HOST $words: /" "$work/answer"; echo "$status" >&6
     done) & hooks=$!
fi
timeout -k 5 "$seconds" qemu-system-x86_64 "${arguments[@]}" </dev/null > >(sed -u 's,\r,,g') 2>"$work/errors" & qemu=$!
wait "$qemu"; ended=$?; qemu=
grep -v "doesn't support requested feature" "$work/errors" >&2
case $ended in
    0) [ -s "$work/status" ] && exit "$(cat "$work/status")"; exit 125;;
    124|137) exit 124;;
    *) exit 126;;
esac
