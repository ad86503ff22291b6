# Five bodies under gravity, in the form that language comparisons have made customary.
cat >t.py <<'P'
from itertools import combinations
from math import pi
MASS, DAYS = 4 * pi * pi, 365.24
bodies = [
    [[0.0] * 3, [0.0] * 3, MASS],
    [[4.84143144246472090, -1.16032004402742839, -0.103622044471123109], [0.00166007664274403694 * DAYS, 0.00769901118419740425 * DAYS, -0.0000690460016972063023 * DAYS], 0.000954791938424326609 * MASS],
    [[8.34336671824457987, 4.12479856412430479, -0.403523417114321381], [-0.00276742510726411 * DAYS, 0.00499852801234917238 * DAYS, 0.0000230417297573763929 * DAYS], 0.000285885980666130812 * MASS],
    [[12.8943695621391310, -15.1111514016986312, -0.223307578892655734], [0.00296460137564761618 * DAYS, 0.00237847173959480950 * DAYS, -0.0000296589568540237556 * DAYS], 0.0000436624404335156298 * MASS],
    [[15.3796971148509165, -25.9193146099879641, 0.179258772950371181], [0.00268067772490389322 * DAYS, 0.00162824170038242295 * DAYS, -0.0000951592254519715870 * DAYS], 0.0000515138902046611451 * MASS],
]
pairs = list(combinations(bodies, 2))
def energy():
    e = sum(m * (v[0] ** 2 + v[1] ** 2 + v[2] ** 2) / 2 for _, v, m in bodies)
    for (a, _, m), (b, _, n) in pairs:
        e -= m * n / ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 + (a[2] - b[2]) ** 2) ** 0.5
    return e
def advance(dt, steps):
    for _ in range(steps):
        for (a, u, m), (b, v, n) in pairs:
            x, y, z = a[0] - b[0], a[1] - b[1], a[2] - b[2]
            mag = dt * (x * x + y * y + z * z) ** -1.5
            u[0] -= x * n * mag; u[1] -= y * n * mag; u[2] -= z * n * mag
            v[0] += x * m * mag; v[1] += y * m * mag; v[2] += z * m * mag
        for p, v, _ in bodies:
            p[0] += dt * v[0]; p[1] += dt * v[1]; p[2] += dt * v[2]
print(repr(energy()))
advance(0.01, 100000)
print(repr(energy()))
P
begin
python3 t.py
finish
