#!/bin/sh
# Guards a world: $1 is its directory. Its standard input is a pipe from the process of the test; should that be killed, the pipe
# closes, and this ends and removes what the test could not: shims, containers, mounts, cgroups and the directory itself.
trap '' INT TERM HUP QUIT
read -r _

name=${1##*/}
# Shims and runtimes name the directory on their command lines, containers are in cgroups of its name.
members() {
    grep --files-with-matches --fixed-strings --text -- "$1" /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3 | grep -vx $$
    find /sys/fs/cgroup -path "*/$name-*" -name cgroup.procs -exec cat {} + 2>/dev/null
}
round=0
while [ $round -lt 200 ]; do
    left=0
    for pid in $(members "$1" | sort -u); do
        [ -d "/proc/$pid" ] || continue
        left=1
        kill -9 "$pid" 2>/dev/null
    done
    [ $left = 0 ] && break
    round=$((round + 1))
    sleep 0.02
done
# The innermost come last in the list.
grep --fixed-strings -- " $1/" /proc/self/mounts | cut -d' ' -f2 | sort --reverse | while read -r mount; do
    umount --lazy "$mount"
done
find /sys/fs/cgroup -depth -type d -path "*/$name-*" -exec rmdir {} + 2>/dev/null
rm -rf --one-file-system "$1"
