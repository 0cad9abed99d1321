#!/bin/sh
# debian.sh FOLDER: fetches what the tests take from Debian. Prometheus (with promtool) is only unpacked into FOLDER, not
# installed or started. Chromium, which needs many libraries, is installed where we are root, as in a container.
# Where something cannot be had, the tests that need it are skipped and say so.
set -eu
mkdir -p "$1"
if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    echo "no apt here: the tests with a real Prometheus are skipped, and without Chromium those of the demo page" >&2
    exit 0
fi
if ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null; then
    if [ "$(id -u)" = 0 ]; then
        install="apt-get -qq install --yes --no-install-recommends chromium fonts-dejavu-core"
        DEBIAN_FRONTEND=noninteractive $install >/dev/null 2>&1 ||
            { apt-get -qq update && DEBIAN_FRONTEND=noninteractive $install >/dev/null; }
    else
        echo "no Chromium here: the tests of the demo page are skipped" >&2
    fi
fi
cd "$1"
apt-get -qq download prometheus 2>/dev/null || { apt-get -qq update && apt-get -qq download prometheus; }
dpkg -x prometheus_*.deb .
rm prometheus_*.deb
