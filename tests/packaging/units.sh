#!/usr/bin/env bash
# Checks what deploy/systemd holds: that systemd understands all of it, and how much each unit could do to its host.
#
#   tests/packaging/units.sh      needs systemd-analyze, systemd-sysusers and systemd-tmpfiles (Debian: systemd)
#
# Nothing is installed or started; the files are tried in a scratch directory.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../deploy/systemd" || exit 1

# Exposure as `systemd-analyze security` counts it, times ten: what a unit has now, so that it cannot get worse unseen.
declare -A exposure_max=([portcullis-ingest]=16 [portcullis-detect]=16 [portcullis-enforce]=19 [portcullis]=21)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0

# check NAME COMMAND...: passes when the command succeeds.
check() {
  local name=$1 out
  shift
  if out=$("$@" 2>&1); then
    echo "test units::$name ... ok"
  else
    echo "test units::$name ... FAILED"
    printf '%s\n' "$out" >&2
    failed=1
  fi
}

# An unknown key is a warning to systemd; here it is a failure.
is_understood() {
  local out
  out=$(systemd-analyze verify --man=no "$scratch/$1.service" 2>&1) && [ -z "$out" ] || { echo "$out"; return 1; }
}

is_confined() {
  systemd-analyze security --offline=true --no-pager --threshold="${exposure_max[$1]}" "$scratch/$1.service"
}

# Those of the firewall for the roles that enforce, and ports below 1024 for those that listen.
has_no_other_capability() {
  local wanted=
  case $1 in
    portcullis) wanted="CAP_NET_ADMIN CAP_NET_RAW CAP_NET_BIND_SERVICE" ;;
    portcullis-enforce) wanted="CAP_NET_ADMIN CAP_NET_RAW" ;;
    portcullis-ingest) wanted=CAP_NET_BIND_SERVICE ;;
  esac
  # In a user namespace of its own a unit has capabilities that are good for nothing outside of it.
  [ -z "$wanted" ] || ! grep -q '^PrivateUsers=' "$1.service" || return 1
  grep -qxF "CapabilityBoundingSet=$wanted" "$1.service" && grep -qxF "AmbientCapabilities=$wanted" "$1.service" \
    && [ "$(grep -cE '^(CapabilityBoundingSet|AmbientCapabilities)=' "$1.service")" -eq 2 ]
}

# A directory that its user may make a socket in, and that no unit with another user takes away.
has_a_place_for_its_socket() {
  local wanted other
  wanted=$(sed -n 's/^RuntimeDirectory=//p' "$1.service")
  [ -n "$wanted" ] || { echo "no RuntimeDirectory"; return 1; }
  for other in $(grep -lx "RuntimeDirectory=$wanted" ./*.service); do
    [ "$(sed -n 's/^User=//p' "$other")" = "$(sed -n 's/^User=//p' "$1.service")" ] || grep -q "^Conflicts=.*${other#./}" "$1.service" \
      || { echo "$other has the same one, and another user"; return 1; }
  done
}

makes_every_user() {
  mkdir -p "$scratch/root/etc"
  systemd-sysusers --root="$scratch/root" "$PWD/sysusers.d/portcullis.conf" || return 1
  local user
  for user in $(sed -n 's/^User=//p' ./*.service | sort -u); do
    grep -q "^$user:" "$scratch/root/etc/passwd" || { echo "$user is not made"; return 1; }
  done
  grep -q '^portcullis:' "$scratch/root/etc/group"
}

# Also where iptables was first and the lock is there already.
opens_the_iptables_lock() {
  makes_every_user || return 1
  mkdir -p "$scratch/root/run"
  install -m 600 /dev/null "$scratch/root/run/xtables.lock"
  systemd-tmpfiles --root="$scratch/root" --create "$PWD/tmpfiles.d/portcullis.conf" || return 1
  local gid
  gid=$(awk -F: '$1 == "portcullis-enforce" { print $3 }' "$scratch/root/etc/group")
  [ "$(stat -c '%a %g' "$scratch/root/run/xtables.lock")" = "640 $gid" ]
}

for file in *.service; do
  # systemd looks for the program, which need not be installed here.
  sed 's|^ExecStart=/usr/local/sbin/portcullis |ExecStart=/bin/true |' "$file" >"$scratch/$file"
done
for file in *.service; do
  unit=${file%.service}
  check "${unit}_is_understood" is_understood "$unit"
  check "${unit}_is_confined" is_confined "$unit"
  check "${unit}_has_no_other_capability" has_no_other_capability "$unit"
done
for unit in portcullis portcullis-ingest; do
  check "${unit}_has_a_place_for_its_socket" has_a_place_for_its_socket "$unit"
done
check every_user_is_made makes_every_user
if [ "$(id -u)" -eq 0 ]; then
  check the_iptables_lock_opens opens_the_iptables_lock
else
  echo "SKIPPED: the lock of iptables: giving files away needs root"
fi
exit $failed
