#!/usr/bin/env bash
# Builds Portcullis and shows at work what it does: first on a sample log, then on yours.
#
#   ./start.sh                          who would be banned by the sample log, and why
#   ./start.sh LOG...                   then follow your Traefik log and report bans, changing nothing
#   ./start.sh --for-real LOG...        follow it and ban in the kernel's firewall (asks sudo unless you are root)
#
# On Debian it installs what is missing (a C compiler; with --for-real also iptables and ipset). It may
# be run again at any time. PORTCULLIS_PROFILE names another of cargo's profiles than `release`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
heading() { printf '\n==> %s\n' "$*"; }
fail() { printf 'start.sh: %s\n' "$*" >&2; exit 1; }

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
can_be_root() { [ ${#as_root[@]} -eq 0 ] || command -v sudo >/dev/null; }

# install COMMAND=PACKAGE...: installs the packages whose command is missing.
install() {
  local entry missing=()
  for entry in "$@"; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${entry%%=*}" >/dev/null || missing+=("${entry#*=}")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || fail "please install: ${missing[*]}"
  can_be_root || fail "please install, as root: apt-get install ${missing[*]}"
  heading "Installing ${missing[*]}"
  local log
  log=$(mktemp)
  if ! { "${as_root[@]}" apt-get update -qq && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    cat "$log" >&2
    fail "could not install ${missing[*]}"
  fi
  rm -f "$log"
}

for_real=no
logs=()
for arg in "$@"; do
  case "$arg" in
    --for-real) for_real=yes ;;
    -h | --help) usage; exit 0 ;;
    -*) usage >&2; fail "unknown option $arg" ;;
    *) logs+=("$arg") ;;
  esac
done
if [ "$for_real" = yes ]; then
  [ ${#logs[@]} -gt 0 ] || fail "--for-real needs a log to follow"
  can_be_root || fail "--for-real changes the firewall: run it as root"
else
  for log in "${logs[@]}"; do [ -r "$log" ] || fail "cannot read $log"; done
fi

command -v cargo >/dev/null || [ ! -f "$HOME/.cargo/env" ] || . "$HOME/.cargo/env"
command -v cargo >/dev/null || fail "Rust is missing: see https://rustup.rs"
install cc=gcc cc=libc6-dev
if [ "$for_real" = yes ]; then install iptables=iptables ipset=ipset; fi

heading "Building (some minutes the first time)"
profile=${PORTCULLIS_PROFILE:-release}
cargo build --quiet --profile "$profile" --locked --package deploy --manifest-path "$here/Cargo.toml"
target=${CARGO_TARGET_DIR:-$here/target}
# Cargo's folder for `dev` has its older name.
[ "$profile" != dev ] || profile=debug
portcullis=$target/$profile/portcullis

heading "Who would be banned by deploy/samples/access.log, when and why"
"$portcullis" replay "$here/deploy/samples/access.log"

if [ ${#logs[@]} -eq 0 ]; then
  heading "Now with your own log"
  cat <<EOT
./start.sh /var/log/traefik/access.log              report bans, change nothing
./start.sh --for-real /var/log/traefik/access.log   ban in the firewall
EOT
elif [ "$for_real" = yes ]; then
  heading "Following ${logs[*]} and banning; Ctrl-C ends it and leaves bans in force until they end"
  exec "${as_root[@]}" "$portcullis" run "${logs[@]}"
else
  heading "Following ${logs[*]} and reporting only; Ctrl-C ends it"
  exec "$portcullis" run --dry-run "${logs[@]}"
fi
