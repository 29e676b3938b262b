#!/bin/sh
# Puts packages into the image's environment and writes their bytecode; the arguments are those of `pip install`.
set -e
[ ! -s /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca
python3 -m pip --python /opt/venv/bin/python install --no-compile "$@"
# A tenth of what the wheels bring is tests of their own.
find /opt/venv/lib -type d -name tests -prune -exec rm -rf {} +
# By hash rather than by time: the bytecode stays good wherever the file is copied to.
/opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib /opt/package || echo "these stay without bytecode" >&2
