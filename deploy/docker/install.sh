#!/bin/sh
# Install packages into the image's environment and compile them; arguments as for `pip install`.
set -e
[ ! -s /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca
python3 -m pip --python /opt/venv/bin/python install --no-compile "$@"
# A tenth of the installed files are the packages' own tests.
find /opt/venv/lib -type d -name tests -prune -exec rm -rf {} +
# Bytecode checked by hash, not by time, stays valid when files are copied.
/opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib /opt/package || echo "some files were not compiled" >&2
