#!/bin/sh
# Owns a sandbox: $1 is its directory, $2 its name. Runs outside the sandbox's namespaces and starts itself again inside.
# It lives as long as the pipe on its standard input is open, which is as long as the process that made the sandbox lives;
# then it ends everything in the sandbox. So nothing survives a panic, a Ctrl-C or a kill -9 of a test.
trap '' INT TERM HUP QUIT

if [ "$3" != inside ]; then
    unshare --net --mount --propagation private -- /bin/sh -c "$KEEPER" keeper "$1" "$2" inside
    rm -rf --one-file-system "$1"
    exit 0
fi

# /run is the sandbox's own: containerd's and kbp's default paths are private without being told.
mount --bind "$1/run" /run || exit 1
# As `ip netns add` leaves it, so that the first namespace is no different from the others.
mkdir /run/netns && mount --bind /run/netns /run/netns && mount --make-shared /run/netns || exit 1
ip link set lo up || exit 1
# Every node has an uplink; its MTU is what routes out of the node get.
ip link add uplink0 mtu 1500 type veth peer name uplink1 && ip link set uplink1 up && ip link set uplink0 up &&
    ip address add 192.0.2.2/24 dev uplink0 && ip route add default via 192.0.2.1 || exit 1
echo "ready $$"
exec >/dev/null

read -r _

own=$(readlink /proc/$$/ns/mnt | sed 's/[][]/\\&/g')
# Everything started in the node, and everything in the cgroups of its containers. Pids of the pipeline itself are gone when they are looked at.
members() {
    find /proc/[0-9]*/ns/mnt -maxdepth 0 -lname "$own" 2>/dev/null | cut -d/ -f3 | grep -vx $$
    find /sys/fs/cgroup -path "*/$1/*" -name cgroup.procs -exec cat {} + 2>/dev/null
}
round=0
while [ $round -lt 200 ]; do
    left=0
    for pid in $(members "$2" | sort -u); do
        [ -d "/proc/$pid" ] || continue
        left=1
        kill -9 "$pid" 2>/dev/null
    done
    [ $left = 0 ] && break
    round=$((round + 1))
    sleep 0.02
done
# Not those of a sandbox whose name only begins like this one's: it may be making one at this moment.
find /sys/fs/cgroup -depth -type d \( -path "*/$2" -o -path "*/$2[/-]*" \) -exec rmdir {} + 2>/dev/null
exit 0
