cat >t.py <<'P'
import json, zlib
data = {"rows": [{"id": i, "name": "row %d" % i, "x": i / 7, "tags": ["a", "b", str(i % 13)], "ok": i % 3 == 0} for i in range(4000)]}
total = 0
for _ in range(40):
    text = json.dumps(data)
    data = json.loads(text)
    total += len(text)
print(total, zlib.crc32(text.encode()), data["rows"][77])
P
begin
python3 t.py
finish
