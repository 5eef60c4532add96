. /tmp/h/H19-env
(time timeout 1500 $PY -m pytest -n0 -m long tests/server/test_kills.py -k twenty -s -q) > /tmp/h/H19-out/kills20.txt 2>&1
date >> /tmp/h/H19-out/kills20.txt
(time timeout 900 /tmp/h/H19-extra/bin/python -m pytest -n0 -m long tests/server/test_schemathesis.py -s -q) > /tmp/h/H19-out/stlong.txt 2>&1
