#!/bin/sh
# debian.sh FOLDER: unpacks Debian's Prometheus (with promtool) into FOLDER for the tests of deploy/. Nothing is installed
# or started. Where there is no apt, the tests that need it are skipped and say so.
set -eu
mkdir -p "$1"
if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    echo "no apt here: the tests with a real Prometheus will be skipped" >&2
    exit 0
fi
cd "$1"
apt-get -qq download prometheus 2>/dev/null || { apt-get -qq update && apt-get -qq download prometheus; }
dpkg -x prometheus_*.deb .
rm prometheus_*.deb
