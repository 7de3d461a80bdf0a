#!/usr/bin/env bash
# Everything that holds this repository together, in one command. Needs Rust; the rest it installs on Debian when missing.
#
#   ./tests/run.sh             every stage
#   ./tests/run.sh STAGE...    some of: fmt clippy deny test nats notify consumers shippers cloudflare packaging start fuzz
#
# The tests that send real packets need root (or sudo) and network namespaces, which they make and remove themselves;
# nothing outside of them is touched. Beside `test`, which mostly waits, run the stages that only need the processor; they
# are shown when the others are done. Ends with `N passed, N failed, N skipped`; fails when anything failed, and under CI=true
# also when anything was skipped.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# Pinned, so that a new version cannot turn a good tree red. Advisories change by the day all the same.
cargo_deny_version=0.20.2
python_packages=tests/requirements.txt
# Long enough to find a parser's shallow mistakes; longer runs are for the desk: see ingest/fuzz.
fuzz_seconds=8

export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never} CARGO_TERM_PROGRESS_WHEN=never
export PATH="$PATH:/usr/sbin:/sbin"
target=${CARGO_TARGET_DIR:-$PWD/target}
export CARGO_TARGET_DIR=$target
tools=$target/tools
python=$tools/python/bin/python
# What is tested outside of `cargo test`, and the servers it runs on; another nats-server may be tried.
export PORTCULLIS=$target/debug/portcullis NATS_SERVER=${NATS_SERVER:-$tools/python/bin/nats-server}
export RSYSLOGD=${RSYSLOGD:-$tools/syslog/rsyslogd} SYSLOG_NG=${SYSLOG_NG:-$tools/syslog/syslog-ng}
passed=0 failed=0 skipped=0

heading() { printf '\n==> %s\n' "$*"; }
pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); printf 'FAILED: %s\n' "$*"; }
skip() { skipped=$((skipped + 1)); printf 'SKIPPED: %s\n' "$*"; }
# check NAME COMMAND...: one result.
check() { local name=$1; shift; if "$@"; then pass; else fail "$name"; fi; }

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo -n)
can_be_root() { [ ${#as_root[@]} -eq 0 ] || sudo -n true 2>/dev/null; }

# install_packages COMMAND=PACKAGE...: installs the packages whose command is missing.
install_packages() {
  local entry missing=()
  for entry in "$@"; do
    command -v "${entry%%=*}" >/dev/null || missing+=("${entry#*=}")
  done
  python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || { echo "please install: ${missing[*]}"; return 1; }
  can_be_root || { echo "please install, as root: apt-get install ${missing[*]}"; return 1; }
  echo "installing ${missing[*]}"
  local log
  log=$(mktemp)
  if ! { "${as_root[@]}" apt-get update -qq && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    cat "$log"
    return 1
  fi
  rm -f "$log"
}

# rsyslogd and syslog-ng, unpacked and not installed: in Debian they exclude each other, and installed they would run.
syslog_packages=(rsyslog rsyslog-gnutls libestr0 libfastjson4 syslog-ng-core libivykis0 libnet1 libjson-c5 libglib2.0-0
  libpcre3 libwrap0)
install_syslog_daemons() {
  local root=$tools/syslog
  [ ! -f "$root/unpacked" ] || return 0
  command -v apt-get >/dev/null || { echo "rsyslog and syslog-ng come from Debian's packages only"; return 1; }
  echo "unpacking ${syslog_packages[*]}"
  rm -rf "$root" && mkdir -p "$root/packages" || return
  local log=$root/log package libraries
  (cd "$root/packages" && { apt-get download -qq "${syslog_packages[@]}" \
    || { "${as_root[@]}" apt-get update -qq && apt-get download -qq "${syslog_packages[@]}"; }; }) >"$log" 2>&1 \
    || { cat "$log"; return 1; }
  for package in "$root"/packages/*.deb; do dpkg-deb -x "$package" "$root" || return; done
  libraries=$(printf '%s:' "$root"/usr/lib/*-linux-* "$root"/lib/*-linux-* "$root/usr/lib/syslog-ng")
  libraries=${libraries%:}
  printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s -M %s "$@"\n' "$libraries" "$root/usr/sbin/rsyslogd" \
    "$(echo "$root"/usr/lib/*-linux-*/rsyslog)" >"$root/rsyslogd"
  printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s --module-path %s "$@"\n' "$libraries" "$root/usr/sbin/syslog-ng" \
    "$(echo "$root"/usr/lib/syslog-ng/[0-9]*)" >"$root/syslog-ng"
  chmod +x "$root/rsyslogd" "$root/syslog-ng" && touch "$root/unpacked"
}

# nats-server, and what the tests in Python import, as pinned.
install_python_packages() {
  local folder=$tools/python
  cmp -s "$python_packages" "$folder/installed" && return
  echo "installing what $python_packages names"
  # Only a whole one gets the list that is compared above.
  python3 -m venv --clear "$folder" \
    && "$python" -m pip install --quiet --disable-pip-version-check --no-compile --requirement "$python_packages" \
    && cp "$python_packages" "$folder/installed"
}

prepare() {
  command -v cargo >/dev/null || [ ! -f "$HOME/.cargo/env" ] || . "$HOME/.cargo/env"
  command -v cargo >/dev/null || { echo "Rust is missing: see https://rustup.rs"; return 1; }
  local component
  for component in fmt clippy; do
    cargo "$component" --version >/dev/null 2>&1 \
      || { echo "cargo $component is missing: rustup component add rustfmt clippy"; return 1; }
  done
  # What the build and the tests call. gcc alone brings no headers.
  install_packages cc=gcc cc=libc6-dev c++=g++ git=git iptables=iptables ipset=ipset nft=nftables ip=iproute2 \
    conntrack=conntrack ps=procps curl=curl jq=jq openssl=openssl faketime=faketime systemd-analyze=systemd \
    python3=python3 node=nodejs npm=npm \
    && install_python_packages && install_syslog_daemons
}

stage_fmt() { check fmt cargo fmt --all --check; }

stage_clippy() { check clippy cargo clippy --quiet --locked --workspace --all-targets -- -D warnings; }

stage_deny() {
  local deny=$tools/bin/cargo-deny
  if [ "$("$deny" --version 2>/dev/null)" != "cargo-deny $cargo_deny_version" ]; then
    echo "building cargo-deny $cargo_deny_version"
    # Unoptimised: it checks this tree in a second, and builds in a third of the time.
    CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_DEBUG=0 \
      CARGO_TARGET_DIR=$tools/build cargo install --quiet --locked --root "$tools" --force \
      cargo-deny --version "$cargo_deny_version" || { fail "cargo-deny could not be built"; return; }
    rm -rf "$tools/build"
  fi
  check deny "$deny" --locked check --hide-inclusion-graph licenses bans sources
  local database=${CARGO_HOME:-$HOME/.cargo}/advisory-dbs
  if [ -d "$database" ]; then
    check advisories "$deny" --locked --offline check --hide-inclusion-graph advisories
  else
    echo "advisories: not checked, their database is not on this machine (cargo deny fetch)"
  fi
}

# Adds up the results in the output of test programs, libtest's and those with a main of their own.
count_tests() {
  local p f i
  read -r p f i < <(awk '/^test .* \.\.\. ok/ { p++ } /^test .* \.\.\. FAILED/ { f++ }
    /^test .* \.\.\. ignored/ || /^SKIPPED/ { i++ } END { print p + 0, f + 0, i + 0 }' "$1")
  passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + i))
  [ $((p + f)) -gt 0 ]
}

# What cargo and libtest say when all is well.
noise='^ +(Compiling|Downloaded|Downloading|Blocking|Locking|Doc-tests)|^test .* \.\.\. ok$|^running | ok\. 0 passed; 0 failed|^$'

# run_tests NAME COMMAND...: each test counts, and one failure more when it did not get that far.
run_tests() {
  local name=$1 log code before=$failed
  shift
  log=$(mktemp)
  "$@" 2>&1 | tee "$log" | grep --line-buffered -vE "$noise"
  code=${PIPESTATUS[0]}
  if ! count_tests "$log" || { [ "$code" -ne 0 ] && [ "$failed" -eq "$before" ]; }; then fail "$name"; fi
  rm -f "$log"
}

# Stages that do not wait for anything, in the order in which they run beside the tests: clippy, which shares cargo's lock
# with them, last.
aside_stages=(deny fuzz clippy)
aside="" aside_folder=""

# Whether a stage was asked for.
is_wanted() { [[ " ${stages[*]} " == *" $1 "* ]]; }
is_aside() { is_wanted test && [[ " ${aside_stages[*]} " == *" $1 "* ]]; }

# run_stage STAGE: with its heading and how long it took.
run_stage() {
  heading "$1"
  SECONDS=0
  "stage_$1"
  printf '    %s: %d min %02d s\n' "$1" $((SECONDS / 60)) $((SECONDS % 60))
}

# Runs what was asked for of `aside_stages`, one after the other, with what is left of the processor; their output and
# results go into files.
start_aside() {
  local stage
  aside_folder=$(mktemp -d)
  trap stop_aside EXIT
  # A process group, to be ended as a whole.
  set -m
  (
    renice -n 19 "$BASHPID" >/dev/null
    for stage in "${aside_stages[@]}"; do
      is_wanted "$stage" || continue
      passed=0 failed=0 skipped=0
      run_stage "$stage" >"$aside_folder/$stage" 2>&1
      echo "$passed $failed $skipped" >"$aside_folder/$stage.results"
    done
  ) </dev/null &
  aside=$!
  set +m
}

# Shows what ran aside, and counts it.
finish_aside() {
  local stage p f s
  SECONDS=0
  wait "$aside"
  for stage in "${aside_stages[@]}"; do
    is_wanted "$stage" || continue
    cat "$aside_folder/$stage"
    if read -r p f s 2>/dev/null <"$aside_folder/$stage.results"; then
      passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    else
      fail "$stage did not get to its end"
    fi
  done
  printf '    waited for them: %d min %02d s\n' $((SECONDS / 60)) $((SECONDS % 60))
}

stop_aside() {
  # It may have ended.
  kill -- "-$aside" 2>/dev/null
  rm -rf "$aside_folder"
}

can_make_namespaces() {
  local name=portcullis-probe-$$
  "${as_root[@]}" ip netns add "$name" 2>/dev/null && "${as_root[@]}" ip netns delete "$name"
}

# The binary that the end-to-end tests start. Built once: later stages must not wait for whoever else holds cargo's lock.
is_built=no
build_portcullis() {
  [ "$is_built" = no ] || return 0
  cargo build --quiet --locked --package deploy || { fail "portcullis does not build"; return 1; }
  is_built=yes
  export PORTCULLIS_BUILT=1
}

stage_test() {
  build_portcullis || return
  # All else is built before what runs beside the tests asks for the processor. A failure is shown below.
  cargo test --quiet --locked --workspace --no-run >/dev/null 2>&1
  start_aside
  if ! can_be_root || ! can_make_namespaces; then
    skip "tests in network namespaces: they need root and the right to make namespaces"
    run_tests tests cargo test --locked --workspace --exclude tests --no-fail-fast -- --skip netns::
    run_tests "tests, end to end" cargo test --locked --package tests --no-fail-fast -- --skip netns:: --skip cluster::
    return
  fi
  if [ ${#as_root[@]} -gt 0 ]; then
    # Built as this user, run as root.
    local host
    host=$(rustc -vV | sed -n 's/^host: //p' | tr a-z- A-Z_)
    export "CARGO_TARGET_${host}_RUNNER=${as_root[*]} env PATH=$PATH CI=${CI:-} NATS_SERVER=$NATS_SERVER RSYSLOGD=$RSYSLOGD SYSLOG_NG=$SYSLOG_NG PORTCULLIS_BUILT=1"
  fi
  run_tests tests cargo test --locked --workspace --no-fail-fast
}

# What each account of NATS may do, and every role at work under them.
stage_nats() {
  build_portcullis || return
  run_tests "accounts of NATS" "$python" tests/nats/accounts.py
  run_tests "roles under accounts of NATS" "$python" tests/nats/accounts_live.py
}

# Telegram and webhooks, from requests to messages.
stage_notify() {
  build_portcullis || return
  run_tests notifiers "$python" tests/notify/test_notify.py
}

# What third parties read, and the examples that read it.
stage_consumers() { run_tests consumers "$python" tests/consumers/test_consumers.py; }

# What programs that push lines send, from requests to bans.
stage_shippers() {
  build_portcullis || return
  run_tests shippers "$python" tests/shippers/test_push.py
}

# The stand-in for Cloudflare that the tests of enforce use, against the official client.
stage_cloudflare() { run_tests cloudflare "$python" tests/cloudflare/official.py; }

# Units are only checked. The cluster of Compose starts, in network namespaces and with a Docker of its own.
stage_packaging() {
  build_portcullis || return
  local units=(tests/packaging/units.sh)
  ! can_be_root || units=("${as_root[@]}" "${units[@]}")
  run_tests "systemd units" "${units[@]}"
  run_tests "logins of roles" "$python" tests/packaging/logins.py
  if ! can_be_root || ! can_make_namespaces; then
    skip "the cluster in containers: it needs root and the right to make namespaces"
  elif ! install_packages mmdebstrap=mmdebstrap logrotate=logrotate || ! PYTHON=$python tests/packaging/docker.sh "$tools/docker"; then
    skip "the cluster in containers: Docker and its images could not be made ready"
  else
    run_tests "cluster in containers" "${as_root[@]}" env "PATH=$PATH" "PORTCULLIS=$PORTCULLIS" \
      "$python" tests/packaging/compose.py "$tools/docker"
  fi
  run_tests "manifests for Kubernetes" "$python" tests/packaging/kubernetes.py
}

# The README's first command, as a new user would type it, twice: it must end in a visible ban and be repeatable. With the
# profile that is built already: the one for users takes minutes more.
stage_start() {
  local out run
  for run in first second; do
    if ! out=$(PORTCULLIS_PROFILE=dev ./start.sh 2>&1); then
      printf '%s\n' "$out"
      fail "start.sh, $run run"
    elif ! grep -q '203\.0\.113\.66.*forceful-browsing' <<<"$out"; then
      printf '%s\n' "$out"
      fail "start.sh, $run run: the sample's scanner is not among the banned"
    else
      [ "$run" = second ] || printf '%s\n' "$out"
      pass
    fi
  done
}

# Fuzz targets on the stable compiler: libFuzzer needs only coverage counters, which rustc has. No address sanitizer: the
# workspace forbids unsafe code.
stage_fuzz() {
  local flags="--cfg fuzzing -Cpasses=sancov-module -Cdebug-assertions -Ccodegen-units=1"
  local option name corpus
  for option in level=4 inline-8bit-counters pc-table trace-compares; do
    flags+=" -Cllvm-args=-sanitizer-coverage-$option"
  done
  # With a target named, the flags stay away from build scripts.
  local host
  host=$(rustc -vV | sed -n 's/^host: //p')
  # Lightly optimised: building takes longer than running.
  RUSTFLAGS=$flags CARGO_TARGET_DIR=$target/fuzz CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_DEBUG=0 \
    cargo build --quiet --locked --release --target "$host" --bins --manifest-path ingest/fuzz/Cargo.toml \
    || { fail "fuzz targets do not build"; return; }
  for name in ingest/fuzz/fuzz_targets/*.rs; do
    name=$(basename "$name" .rs)
    corpus=$(mktemp -d)
    [ ! -d "ingest/fuzz/corpus/$name" ] || cp -r "ingest/fuzz/corpus/$name/." "$corpus"
    echo "$name, $fuzz_seconds s from $(find "$corpus" -type f | wc -l) seeds"
    if "$target/fuzz/$host/release/$name" -max_total_time="$fuzz_seconds" -timeout=5 -rss_limit_mb=1024 \
      -artifact_prefix="$target/fuzz/" -print_final_stats=0 "$corpus" >"$corpus.log" 2>&1; then
      pass
    else
      tail -n 60 "$corpus.log"
      fail "fuzz target $name; its input is in $target/fuzz/"
    fi
    rm -rf "$corpus" "$corpus.log"
  done
}

stages=(fmt clippy deny test nats notify consumers shippers cloudflare packaging start fuzz)
case "${1:-}" in
  -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  "") ;;
  *) stages=("$@") ;;
esac
for stage in "${stages[@]}"; do
  declare -F "stage_$stage" >/dev/null || { echo "unknown stage $stage" >&2; exit 2; }
done

heading "prepare"
if prepare; then
  for stage in "${stages[@]}"; do
    is_aside "$stage" || run_stage "$stage"
  done
  if is_wanted test; then
    [ -n "$aside" ] || start_aside
    finish_aside
  fi
else
  fail "prepare"
fi

printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
[ "$failed" -eq 0 ] && { [ "${CI:-}" != true ] || [ "$skipped" -eq 0 ]; }
