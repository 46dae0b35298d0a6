#!/usr/bin/env bash
# Chromium for the tests of the page, where none is there, we are root and apt-get knows how; without it they are skipped.
set -euo pipefail
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then
        exit 0
    fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "there is no Chromium, and it takes root and apt-get to install one here: the tests of the page will be skipped" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation; } >/dev/null; then
    echo "Chromium could not be installed: the tests of the page will be skipped" >&2
fi
