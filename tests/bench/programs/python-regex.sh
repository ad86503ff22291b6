cat >t.py <<'P'
import re
text = " ".join("user%d@host%d.example.org 2024-%02d-%02d https://www.example.org/%d?q=%d word%d" % (i, i % 97, i % 12 + 1, i % 28 + 1, i, i * i, i * 7) for i in range(12000))
total = 0
for pattern in (r"[\w.]+@[\w.]+\.org", r"(\d{4})-(\d\d)-(\d\d)", r"https?://([^/\s]+)/(\d+)\?q=(\d+)", r"\b\w*7\b", r"(?:a|b|us|wo)[a-z]+\d+"):
    for _ in range(4):
        found = re.findall(pattern, text)
        total += len(found)
    print(pattern, found[-1])
print(total, len(re.sub(r"(\w+)@(\w+)", r"\2 at \1", text)))
P
begin
python3 t.py
finish
