# What a file system does, told so that two of them can be compared line by line. Runs in an empty
# directory, as root.
import errno, fcntl, mmap, os, socket, stat, subprocess, sys, time

os.umask(0o22)
os.makedirs("w", exist_ok=True)
os.chdir("w")


def tell(name, *what):
    print(name + ":", *what, flush=True)


def attempt(name, act):
    try:
        result = act()
        tell(name, "ok" if result is None else result)
    except OSError as e:
        tell(name, errno.errorcode[e.errno])


def put(path, data=b"x", mode=0o644):
    with open(path, "wb") as f:
        f.write(data)
    os.chmod(path, mode)


def get(path):
    with open(path, "rb") as f:
        return f.read()


def mode(path):
    return oct(os.lstat(path).st_mode)


def owner(path):
    s = os.lstat(path)
    return f"{s.st_uid}:{s.st_gid}"


def as_user(uid, gid, groups, act):
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(groups)
            os.setgid(gid)
            os.setuid(uid)
            act()
        except OSError as e:
            os._exit(min(e.errno, 255))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "ok" if code == 0 else errno.errorcode.get(code, code)


# Names
put("a")
attempt("create exclusively", lambda: os.close(os.open("a", os.O_CREAT | os.O_EXCL | os.O_WRONLY)))
attempt("a directory where a file is", lambda: os.mkdir("a"))
os.mkdir("d")
attempt("a directory again", lambda: os.mkdir("d"))
put("d/x")
attempt("remove a full directory", lambda: os.rmdir("d"))
attempt("unlink a directory", lambda: os.unlink("d"))
attempt("open a directory for writing", lambda: os.open("d", os.O_WRONLY))
attempt("a name of 255 bytes", lambda: put("n" * 255))
attempt("a name of 256 bytes", lambda: put("n" * 256))
attempt("below a file", lambda: put("a/b"))
attempt("missing", lambda: get("missing"))
for name in ["ünïcödé", "日本語", "emoji-😀", "with space", "new\nline", "-dash", "..dots"]:
    put(name, name.encode())
tell("strange names", sorted(os.listdir(".")) == sorted(os.listdir(os.getcwd())), get("日本語").decode())
tell("list", [n for n in sorted(os.listdir(".")) if len(n) < 100])

# Renaming
put("r1", b"one")
put("r2", b"two")
os.rename("r1", "r2")
tell("rename over", get("r2"), os.path.exists("r1"))
os.mkdir("rd1")
os.mkdir("rd2")
put("rd2/f")
attempt("rename over a full directory", lambda: os.rename("rd1", "rd2"))
attempt("rename over an empty directory", lambda: os.rename("rd2", "rd1"))
attempt("rename into itself", lambda: os.rename("rd1", "rd1/x"))
attempt("rename a file over a directory", lambda: os.rename("r2", "d"))
attempt("rename what is missing", lambda: os.rename("nope", "r3"))
with open("r2", "rb") as f:
    os.rename("r2", "r4")
    tell("open while renamed", f.read())

# Links
put("l1", b"linked")
os.link("l1", "l2")
tell("hard link", os.stat("l1").st_nlink, os.stat("l1").st_ino == os.stat("l2").st_ino)
put("l2", b"changed")
tell("through the other name", get("l1"))
os.unlink("l1")
tell("one name less", os.stat("l2").st_nlink, get("l2"))
attempt("link a directory", lambda: os.link("d", "d2"))
attempt("link over", lambda: os.link("l2", "a"))
os.symlink("l2", "s1")
os.symlink("nowhere", "s2")
os.symlink("/etc/hostname", "s3")
os.symlink("s4", "s4")
tell("symbolic links", os.readlink("s1"), get("s1"), os.readlink("s2"), os.readlink("s3"))
attempt("dangling", lambda: get("s2"))
attempt("a loop", lambda: get("s4"))
attempt("follow no link", lambda: os.open("s1", os.O_RDONLY | os.O_NOFOLLOW))
os.symlink("l2", "s5")
os.link("s5", "s6", follow_symlinks=False)
tell("link to a link", os.readlink("s6"), os.lstat("s6").st_nlink)

# Attributes
put("m", mode=0o600)
for bits in [0o755, 0o4755, 0o2755, 0o1777, 0]:
    os.chmod("m", bits)
    tell("mode", mode("m"))
os.chown("m", 1000, 1001)
tell("owner", owner("m"))
os.chmod("m", 0o6755)
os.chown("m", 1002, -1)
tell("set-uid after chown", mode("m"), owner("m"))
os.lchown("s1", 7, 8)
tell("owner of a link", owner("s1"), owner("l2"))
os.utime("m", ns=(1_000_000_000_123_456_789, 2_000_000_000_987_654_321))
s = os.stat("m")
tell("times", s.st_atime_ns, s.st_mtime_ns)
os.utime("s2", ns=(5, 6), follow_symlinks=False)
tell("times of a link", os.lstat("s2").st_mtime_ns)
before = os.stat("m").st_ctime_ns
time.sleep(0.05)
os.chmod("m", 0o644)
tell("ctime moves", os.stat("m").st_ctime_ns > before)
try:
    os.setxattr("m", "user.key", b"value")
    os.setxattr("m", "user.\u00fc", b"\0\1\2")
    tell("xattrs", sorted(os.listxattr("m")), os.getxattr("m", "user.key"), os.getxattr("m", "user.ü"))
    attempt("xattr exclusively", lambda: os.setxattr("m", "user.key", b"", os.XATTR_CREATE))
    attempt("xattr replace", lambda: os.setxattr("m", "user.none", b"", os.XATTR_REPLACE))
    os.removexattr("m", "user.key")
    attempt("xattr removed", lambda: os.getxattr("m", "user.key"))
    attempt("a long xattr", lambda: len(os.setxattr("m", "user.l", b"l" * 2000) or os.getxattr("m", "user.l")))
except OSError as e:
    tell("xattrs", errno.errorcode[e.errno])

# Data
with open("f", "w+b") as f:
    f.write(b"0123456789")
    f.flush()
    os.ftruncate(f.fileno(), 5)
    tell("truncated", os.fstat(f.fileno()).st_size)
    os.ftruncate(f.fileno(), 8)
    f.seek(0)
    tell("grown", f.read())
os.truncate("f", 3)
tell("by name", get("f"))
with open("f", "ab") as f, open("f", "ab") as g:
    f.write(b"A")
    f.flush()
    g.write(b"B")
    g.flush()
tell("append", get("f"))
fd = os.open("sparse", os.O_CREAT | os.O_RDWR)
os.pwrite(fd, b"end", 10 << 20)
tell("sparse", os.fstat(fd).st_size, os.fstat(fd).st_blocks * 512 < 1 << 20, os.pread(fd, 4, 5 << 20))
tell("data begins", os.lseek(fd, 0, os.SEEK_DATA) >= (10 << 20) - 65536, os.lseek(fd, 0, os.SEEK_HOLE))
os.posix_fallocate(fd, 0, 1 << 20)
tell("allocated", os.fstat(fd).st_blocks * 512 >= 1 << 20, os.fstat(fd).st_size)
os.fsync(fd)
os.fdatasync(fd)
os.close(fd)
fd = os.open("gone", os.O_CREAT | os.O_RDWR)
os.write(fd, b"still here")
os.unlink("gone")
tell("unlinked while open", os.pread(fd, 20, 0), os.fstat(fd).st_nlink, os.path.exists("gone"))
os.close(fd)
put("mm", b"m" * 8192)
with open("mm", "r+b") as f:
    with mmap.mmap(f.fileno(), 8192) as one, mmap.mmap(f.fileno(), 8192) as two:
        one[100:104] = b"abcd"
        tell("two maps", bytes(two[98:106]))
        one.flush()
        tell("by read", get("mm")[98:106])
with open("mm", "rb") as f, mmap.mmap(f.fileno(), 8192, mmap.MAP_PRIVATE, mmap.PROT_READ) as m:
    with open("mm", "r+b") as g:
        g.seek(5000)
        g.write(b"written")
    tell("map after write", bytes(m[4998:5009]))
big = bytes(range(256)) * 8192
put("big", big)
tell("two megabytes", get("big") == big)

# Locks
fd = os.open("lock", os.O_CREAT | os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX)


def second(how):
    def act():
        other = os.open("lock", os.O_RDWR)
        how(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return act


tell("flock", as_user(0, 0, [], second(fcntl.flock)))
fcntl.flock(fd, fcntl.LOCK_UN)
fcntl.lockf(fd, fcntl.LOCK_EX, 10)
tell("record lock", as_user(0, 0, [], second(lambda f, how: fcntl.lockf(f, how, 10))))
tell("beside it", as_user(0, 0, [], second(lambda f, how: fcntl.lockf(f, how, 10, 20))))
os.close(fd)
tell("after close", as_user(0, 0, [], second(lambda f, how: fcntl.lockf(f, how, 10))))

# Other users
os.mkdir("users", 0o755)
os.chown("users", 1000, 1000)
tell("own directory", as_user(1000, 1000, [], lambda: put("users/mine")), owner("users/mine"))
tell("another's directory", as_user(1001, 1001, [], lambda: put("users/theirs")))
os.mkdir("shared", 0o770)
os.chown("shared", 0, 2000)
os.chmod("shared", 0o2770)
tell("by group", as_user(1000, 1000, [2000], lambda: put("shared/g")), owner("shared/g"))
tell("not by group", as_user(1000, 1000, [], lambda: put("shared/h")))
os.mkdir("shared/sub")
tell("set-gid directory", oct(os.stat("shared/sub").st_mode), owner("shared/sub"))
os.mkdir("sticky")
os.chmod("sticky", 0o1777)
tell("sticky", as_user(1000, 1000, [], lambda: put("sticky/f")), as_user(1001, 1001, [], lambda: os.unlink("sticky/f")))
put("suid", b"x" * 10)
os.chmod("suid", 0o6777)


def overwrite():
    with open("suid", "r+b") as f:
        f.write(b"y")


tell("set-uid after a write", as_user(1000, 1000, [], overwrite), mode("suid"))
put("private", mode=0o600)
tell("private", as_user(1000, 1000, [], lambda: get("private")))
tell("chown as user", as_user(1000, 1000, [], lambda: os.chown("users/mine", 0, 0)))

# What is no file
os.mkfifo("fifo", 0o640)
tell("fifo", mode("fifo"))
reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
writer = os.open("fifo", os.O_WRONLY)
os.write(writer, b"through")
tell("through it", os.read(reader, 10))
server = socket.socket(socket.AF_UNIX)
server.bind("sock")
server.listen()
client = socket.socket(socket.AF_UNIX)
attempt("socket", lambda: client.connect("sock"))
tell("its kind", stat.S_ISSOCK(os.stat("sock").st_mode))

# Many
os.mkdir("many")
for i in range(2000):
    os.close(os.open(f"many/{i:05}", os.O_CREAT | os.O_WRONLY))
tell("many", len(set(os.listdir("many"))))
for i in range(0, 2000, 2):
    os.unlink(f"many/{i:05}")
tell("half", len(os.listdir("many")), sorted(os.listdir("many"))[:3])
with os.scandir("many") as entries:
    tell("their kinds", all(e.is_file(follow_symlinks=False) and e.inode() == os.lstat(e.path).st_ino for e in entries))
deep = "/".join(["deep"] * 60)
os.makedirs(deep)
put(deep + "/f")
tell("deep", get(deep + "/f"), os.path.samefile("deep", deep + "/" + "/".join([".."] * 59)))
put("prog", b"#!/bin/sh\necho runs $0\n", 0o755)
tell("program", subprocess.run(["./prog"], capture_output=True).stdout)
put("prog", b"#!/bin/sh\necho changed\n", 0o755)
tell("changed", subprocess.run(["./prog"], capture_output=True).stdout)
os.chdir("..")
subprocess.run(["rm", "-rf", "w"], check=True)
tell("removed", os.path.exists("w"))
