#!/bin/sh
# Print the newest Python that edgeship is tested on and that runs here; nothing when there is none.
# A name alone is no interpreter: version managers put names on the path that only say what they lack.
for name in python3.13 python3.12 python3.11 python3 python; do
    if command -v "$name" >/dev/null 2>&1 &&
        "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
    then
        echo "$name"
        exit 0
    fi
done
