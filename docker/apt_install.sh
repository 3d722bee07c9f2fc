#!/usr/bin/env bash
# Install packages of the distribution, without what they only recommend.
#   apt_install.sh python3-venv g++
set -euo pipefail

[ $# -gt 0 ] || { echo "apt_install.sh: which packages?" >&2; exit 2; }
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
