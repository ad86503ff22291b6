cat >t.js <<'J'
let s = 0; for (let i = 0; i < 3e7; i++) s = (s * 1103515245 + 12345) % 2147483648;
console.log(s);
const n = 200, a = new Float64Array(n * n).map((_, i) => i % 7 / 3), b = new Float64Array(n * n).map((_, i) => i % 11 / 5), c = new Float64Array(n * n);
for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) { let t = 0; for (let k = 0; k < n; k++) t += a[i * n + k] * b[k * n + j]; c[i * n + j] = t; }
console.log(c[777], c.reduce((x, y) => x + y));
const o = new Map(); for (let i = 0; i < 500000; i++) { const k = 'k' + i % 5000; o.set(k, (o.get(k) || 0) + i); }
console.log(o.size, o.get('k7'));
const l = Array.from({ length: 300000 }, (_, i) => ({ k: i * 7919 % 300007 })); l.sort((x, y) => x.k - y.k);
console.log(l[500].k, l.reduce((x, y) => x + y.k, 0));
J
begin
node t.js
finish
