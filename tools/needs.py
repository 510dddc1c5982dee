"""What a wheel requires, without the packages of a pattern: `needs.py WHEEL PATTERN`."""

import email
import re
import sys
import zipfile

wheel = zipfile.ZipFile(sys.argv[1])
name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
left_out = re.compile(rf"({sys.argv[2]})\b(?!-)")
for needed in email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist") or ():
    if "extra ==" not in needed and not left_out.match(needed):
        sys.stdout.write(f"{needed}\n")
