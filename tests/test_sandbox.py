"""tools.py: `python`, which runs what a model wrote. Each attempt to get out fails, says so, and leaves no trace outside.

Whether a sandbox held is not told by an error message alone. So there is a world outside, with things to steal, to reach and to
break, made easy on purpose: files that everybody may read and write, servers that talk to everybody, secrets in the environment.
After each attempt it is looked at. And without the sandbox the same programs do get through, or these tests would prove nothing.
"""

import asyncio
import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from random import Random

import code_env
import pytest

import tools
from agent import Agent, Chat, Script, small_tokenizer
from env import EnvError, check_env, demonstrator, make_env, split
from tools import Call, format_call, parse, run_calls, schema

# On a contributor's machine without bubblewrap they are skipped; where CI is set it has to be there, and they fail.
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None and "CI" not in os.environ,
                                      reason="no bubblewrap: apt-get install bubblewrap")


def observe(*programs, timeout=10.0, max_chars=5000):
    """The observations of programs that were called in one message."""
    calls = [Call("python", {"code": program}) for program in programs]
    return asyncio.run(run_calls(calls, {"python": tools.python}, timeout=timeout, max_chars=max_chars))


# ---- the world outside ----


class World:
    """What a program might steal, reach or break."""

    def __init__(self):
        self.token, self.folder = uuid.uuid4().hex, pathlib.Path(tempfile.mkdtemp())
        self.secret = self.folder / "secret"
        self.secret.write_text(self.token)
        self.folder.chmod(0o777), self.secret.chmod(0o666)
        os.environ["API_KEY"] = self.token
        self.descriptor = os.open(self.secret, os.O_RDONLY)
        os.set_inheritable(self.descriptor, True)
        self.visitors = []
        self.server, self.datagrams = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind("\0" + self.token[:8])
        self.abstract.listen()
        for listen in (self.server.accept, self.abstract.accept, lambda: self.datagrams.recvfrom(10)):
            threading.Thread(target=self._serve, args=(listen,), daemon=True).start()
        # A process of the very user that the program is, outside.
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
        self.victim = subprocess.Popen([*nobody, "sleep", "1000"])
        self.library = self._library()
        self.names = {
            "secret": self.secret, "folder": self.folder, "port": self.server.getsockname()[1], "victim": self.victim.pid,
            "udp": self.datagrams.getsockname()[1], "abstract": self.token[:8], "marker": f"left-by-{self.token[:8]}",
            "repository": pathlib.Path(tools.__file__).parent, "home": pathlib.Path.home(),
        }  # fmt: skip

    def _library(self):
        """Of the Python that the sandbox shows: one of its files, wherever it lies."""
        files = [path for root in ("/usr/lib", "/usr/local/lib") for path in pathlib.Path(root).glob("python3*/os.py")]
        return {path: (path.stat().st_mode, path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    def _serve(self, listen):
        with contextlib.suppress(OSError):  # closed
            while True:
                self.visitors.append(listen())

    def close(self):
        self.victim.kill(), self.victim.wait()
        for server in (self.server, self.abstract, self.datagrams):
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()
        os.close(self.descriptor), shutil.rmtree(self.folder)
        del os.environ["API_KEY"]

    def fill(self, program):
        """A program with the world's names in it. Not by str.format: programs are full of braces."""
        return re.sub(r"<(\w+)>", lambda match: str(self.names[match[1]]), program)

    def left_behind(self):
        """Processes that a program began and marked."""
        marked = []
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # ended in the meantime
                if self.names["marker"].encode() in path.read_bytes():
                    marked.append(int(path.parent.name))
        return marked

    def harm(self):
        """What has changed out here."""
        found = [f"process {pid} is there" for pid in self.left_behind()]
        found += [f"visitor {visitor}" for visitor in self.visitors]
        found += [f"new file {path.name}" for path in self.folder.iterdir() if path != self.secret]
        found += ["the victim was killed"] * (self.victim.poll() is not None)
        found += ["the library was changed"] * (self._library() != self.library)
        kept = self.secret.exists() and self.secret.read_text() == self.token and self.secret.stat().st_nlink == 1
        return found + ["the file was changed"] * (not kept)


@pytest.fixture
def world():
    world = World()
    yield world
    for pid in world.left_behind():
        os.kill(pid, signal.SIGKILL)
    world.close()


# ---- what works ----

WORKS = {
    "arithmetic": ("print(6 * 7)", "42"),
    "several lines": ("for n in range(3):\n    print(n)", "0\n1\n2"),
    "the standard library": ("import math, json, fractions, sqlite3, re\nprint(json.dumps([math.comb(50, 25)]))", "[126410606437752]"),
    "the scratch folder": ("import os\nopen('a', 'w').write('b')\nprint(os.getcwd(), os.listdir(), open('a').read())", "/tmp ['a'] b"),
    "temporary files": ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'x' * 1000))", "1000"),
    "unicode": ("print('π 数 🙂')", "π 数 🙂"),
    "half a character": ("print(len('\ud800'))", "1"),
    "stderr": ("import sys; print('a', flush=True); print('b', file=sys.stderr)", "a\nb"),
    "a main program": ("if __name__ == '__main__': print(__file__)", "/code.py"),
    "threads": ("import concurrent.futures as f\nprint(*f.ThreadPoolExecutor(3).map(abs, [-1, 2]))", "1 2"),
    "processes": ("import os\npid = os.fork()\nprint('parent' if pid and os.wait() else 'child')", "child\nparent"),
    "an event loop": ("import asyncio\nprint(asyncio.run(asyncio.sleep(0, 7)))", "7"),
    "200 MB": ("print(len(bytes(200_000_000)))", "200000000"),
    "long programs": ("x = 1\n" * 50_000 + "print(x)", "1"),
    "silence": ("x = 1", "(nothing was printed)"),
    "leaving": ("import sys; print('bye'); sys.exit()", "bye"),
}


@needs_bubblewrap
@pytest.mark.parametrize("case", WORKS)
def test_programs_run_and_what_they_print_comes_back(case):
    program, printed = WORKS[case]
    (observation,) = observe(program)
    assert (observation.text.strip(), observation.error) == (printed, False)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("def f(x):\n    return 1 / x\nprint('a')\nf(0)", "exit code 1. It wrote: a .*line 2, in f .*ZeroDivisionError: division by zero$"),
        ("print('a'", r"SyntaxError: '\(' was never closed$"),
        ("raise ValueError('what is wrong')", "ValueError: what is wrong$"),
        ("import sys; sys.exit(3)", "exit code 3. It wrote: nothing$"),
        ("print('\0')", "SyntaxError"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("import ctypes; ctypes.string_at(0)", "exit code 139"),  # 128 + SIGSEGV
    ],
)
def test_what_went_wrong_comes_back(program, message):
    (observation,) = observe(program)
    assert observation.error and re.search(message, observation.text), observation.text


@needs_bubblewrap
def test_each_call_starts_afresh_and_two_at_once_do_not_disturb_each_other():
    """Programs of one message run at the same time, and the limit on processes is counted for each of them alone."""
    keep = "x = 5; open('kept', 'w').write('x')"
    assert [o.text for o in observe(keep)] == ["(nothing was printed)"]
    look = "import os, time\nopen('mine', 'w').write('%d'); time.sleep(0.1)\nprint('x' in globals(), os.listdir(), open('mine').read())"
    fork = "import os\nfor n in range(4): os.fork() or (__import__('time').sleep(0.5), os._exit(0))\nprint('four')"
    observations = observe(*(look % n for n in range(4)), *[fork] * 4)
    assert [o.text for o in observations] == [f"False ['mine'] {n}\n" for n in range(4)] + ["four\n"] * 4


# ---- getting out ----

X86 = ["runs native code", "runs 32-bit code", "calls by x32 numbers", "traces a process", "reads a process", "mounts", "unmounts",
       "makes a user namespace", "clones into one", "changes its root", "takes memory that nobody owns"]  # fmt: skip


def here(attempts):
    """Without those that are written in another machine's code or numbers."""
    return [name for name in attempts if name not in X86 or os.uname().machine == "x86_64"]


CTYPES = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef call(*a):\n    print(libc.syscall(*a), ctypes.get_errno())\n"
SLEEP = "os.execv(sys.executable, ['<marker>', '-c', 'import time; time.sleep(60)'])"
MISSING, DENIED, READ_ONLY = "FileNotFoundError", r"\[Errno 1\] Operation not permitted", r"\[Errno 30\] Read-only file system"

# An ELF file of one system call: open(path, O_WRONLY | O_CREAT, 0o666); exit(-result).
NATIVE = r"""
import os, struct
code = bytes.fromhex('b802000000 488d3d17000000 be41000000 bab6010000 0f05 89c7 f7df b83c000000 0f05') + b'<folder>/new\0'
size = 64 + 56 + len(code)
with open('a', 'wb') as file:
    file.write(struct.pack('<16sHHIQQQIHHHHHH', b'\x7fELF\2\1\1', 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0))
    file.write(struct.pack('<IIQQQQQQ', 1, 5, 0, 0x400000, 0x400000, size, size, 0x1000) + code)
os.chmod('a', 0o700); os.execv('./a', ['a'])
"""

# Programs that would do it: run outside, as whoever runs the tests, each does get through. Then: what the sandbox answers.
ESCAPES = {
    "reads the users": ("print(open('/etc/passwd').read())", MISSING),
    "reads the repository": ("print(open('<repository>/tools.py').read())", MISSING),
    "lists the home": ("import os; print(os.listdir('<home>'))", MISSING),
    "lists the root": ("import os; print(*sorted(os.listdir('/')))", r"^(code\.py|dev|etc|lib|lib64|tmp|usr| |\n)+$"),
    "reads a file": ("print(open('<secret>').read())", MISSING),
    "climbs": ("print(open('../' * 20 + '<secret>').read())", MISSING),
    "writes a file": ("open('<folder>/new', 'w')", MISSING),
    "changes a file": ("open('<secret>', 'w').write('mine')", MISSING),
    "removes a file": ("import os; os.remove('<secret>')", MISSING),
    "links": ("import os; os.symlink('<secret>', 'a'); print(open('a').read()); open('a', 'w').write('mine')", MISSING),
    "links hard": ("import os; os.link('<secret>', '<folder>/hard')", MISSING),
    "makes a link to a folder": ("import os; os.symlink('<folder>', 'a'); open('a/new', 'w')", MISSING),
    "reads through another's root": ("print(open('/proc/<victim>/root<secret>').read())", MISSING),
    "reads through its own root": ("print(open('/proc/self/root<secret>').read())", MISSING),
    "reads its environment": ("import os; print(*os.environ.values(), sep='\\n')", r"\A(/tmp|C\.UTF-8|\n)+\Z"),
    "reads it from /proc": ("print(open('/proc/self/environ').read())", MISSING),
    "reads every environment": ("import glob\nfor p in glob.glob('/proc/*/environ'): print(p)", r"^\(nothing was printed\)$"),
    "asks libc for it": ("import ctypes\ng = ctypes.CDLL(None).getenv\ng.restype = ctypes.c_char_p\nprint(g(b'API_KEY'))", "^None$"),
    "goes by subclasses": (
        "[c] = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'BuiltinImporter']\n"
        "posix = c.load_module('posix'); print(posix.read(posix.open('<secret>', 0), 99))", MISSING),
    "calls by loopback": ("import socket; socket.create_connection(('127.0.0.1', <port>))", DENIED),
    "calls by UDP": ("import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', <udp>))", DENIED),
    "calls an abstract socket": ("import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + '<abstract>')", DENIED),
    "calls by libc": (
        CTYPES + "s = libc.socket(2, 1, 0)\nn = (<port>).to_bytes(2, 'big')\n"
        "print(s, libc.connect(s, b'\\2\\0' + n + bytes([127, 0, 0, 1]) + bytes(8), 16))", "^-1 -1$"),
    "kills a process": ("import os; os.kill(<victim>, 9)", "ProcessLookupError"),
    "runs a shell": ("import subprocess; subprocess.run('touch <folder>/new', shell=True)", MISSING),
    "runs native code": (NATIVE, "exit code 2"),  # ENOENT
    "runs a shell by libc": ("import ctypes; print(ctypes.CDLL(None).system(b'touch <folder>/new'))", "^32512$"),  # 127: no shell
    "outlives the call": (
        "import os, sys\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.closerange(0, 99)\n        " + SLEEP,
        r"^\(nothing was printed\)$"),
    "outlives it and holds the output": ("import os, sys\nif os.fork() == 0:\n    os.setsid()\n    " + SLEEP, r"^\(nothing was printed\)$"),
}  # fmt: skip


@needs_bubblewrap
@pytest.mark.parametrize("case", here(ESCAPES))
def test_nothing_gets_out(case, world):
    program, answer = ESCAPES[case]
    (observation,) = observe(world.fill(program))
    assert world.harm() == []
    assert world.token not in observation.text
    assert re.search(answer, observation.text), observation.text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux's")
@pytest.mark.parametrize("case", here(ESCAPES))
def test_without_the_sandbox_it_would(case, world, tmp_path):
    """An attempt that fails anyhow proves nothing. It gets through if something has changed or it printed what the sandbox hides."""
    program, answer = ESCAPES[case]
    argv = [sys.executable, "-I", "-S", "-c", world.fill(program)]
    with open(tmp_path / "out", "w+") as out:  # no pipe: some hold it for a minute
        subprocess.run(argv, cwd=tmp_path, stdout=out, stderr=out, stdin=subprocess.DEVNULL, pass_fds=[world.descriptor])
        out.seek(0)
        printed = out.read() or "(nothing was printed)"
    deadline = time.monotonic() + 5
    while not (harm := world.harm()) and time.monotonic() < deadline and re.search(answer, printed):
        time.sleep(0.01)  # a server may need a moment to notice
    assert harm or not re.search(answer, printed)


# What must not be tried outside. The program, and what it says.
BOMBS = {
    "reads the passwords": ("print(open('/etc/shadow').read())", MISSING),
    "finds open files": (
        "import os\nfor n in range(3, 1024):\n    try: print(n, os.fstat(n))\n    except OSError: pass", r"^\(nothing was printed\)$"),
    "reads our input": ("input()", "EOFError"),
    "reads our input's file": ("import os; print(os.read(0, 9))", "^b''$"),
    "writes to the interpreter": ("import os; open(os.__file__, 'a').write('print(1)')", READ_ONLY + "|Permission denied"),
    "replaces a library": ("import os; os.rename(os.__file__, os.__file__ + 'c')", READ_ONLY),
    "makes a library writable": ("import os; os.chmod(os.__file__, 0o777)", READ_ONLY + r"|\[Errno 1\]"),
    "writes to the root": ("open('/new', 'w')", READ_ONLY),
    "changes its program": ("open('/code.py', 'w')", READ_ONLY),
    "imports what we have installed": ("import torch", "ModuleNotFoundError"),
    "looks for processes": ("import os; os.listdir('/proc')", MISSING),
    "sets the kernel": ("open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')", MISSING),
    "looks at the devices": ("import os; print(os.listdir('/dev')); os.listdir('/sys')", r"\['null'\].*FileNotFoundError"),
    "reads the memory": ("open('/dev/mem', 'rb').read(1)", MISSING),
    "makes a device": ("import os, stat; os.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0))", DENIED),
    "opens a raw socket": ("import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", DENIED),
    "opens a packet socket": ("import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", DENIED),
    "talks to the kernel's network": ("import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", DENIED),
    "talks to the hypervisor": ("import socket; socket.socket(socket.AF_VSOCK).connect((2, 1))", DENIED),
    "asks for a name": ("import socket; print(socket.getaddrinfo('example.com', 80))", "gaierror"),
    "listens": ("import socket; socket.create_server(('127.0.0.1', 0))", DENIED),
    "traces a process": (CTYPES + "call(101, 16, <victim>, 0, 0)", "^-1 1$"),
    "reads a process": (CTYPES + "call(310, <victim>, 0, 0, 0, 0, 0)", "^-1 1$"),
    "kills everybody": ("import os; os.kill(-1, 9)", "ProcessLookupError"),
    "kills its parent": ("import os\nprint(os.getppid()); os.kill(os.getppid(), 9); print('still here')", "^1\nstill here$"),
    "kills by number": (
        "import os\nfor pid in range(3, 100000):\n    try: os.kill(pid, 9); print(pid)\n    except OSError: pass", "nothing was printed"),
    "becomes root": ("import os; os.setuid(0)", r"\[Errno (1|22)\]"),
    "runs a setuid program": ("import os; os.execv('/usr/bin/su', ['su'])", MISSING),
    "makes a setuid program": (
        "import os, shutil, sys\nshutil.copy(sys.executable, 'a'); os.chmod('a', 0o6755)\n"
        "os.execv('a', ['a', '-ISc', 'import os; print(os.geteuid())'])", "^65534$"),
    "mounts": (CTYPES + "call(165, b'none', b'/tmp', b'tmpfs', 0, 0)", "^-1 1$"),
    "unmounts": (CTYPES + "call(166, b'/usr/lib', 2)", "^-1 1$"),
    "makes a user namespace": (CTYPES + "call(272, 0x10000000)", "^-1 1$"),
    "clones into one": (CTYPES + "call(56, 0x10000000 | 17, 0, 0, 0, 0)", "^-1 (1|28)$"),
    "clones another way": (
        CTYPES + "import struct\ncall(435, struct.pack('8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)", "^-1 (1|28)$"),
    "leaves its root": ("import os; os.mkdir('a'); os.chroot('a')", DENIED),
    "changes its root": (CTYPES + "call(155, b'/tmp', b'/tmp')", "^-1 1$"),
    "names the machine": ("import socket; socket.sethostname('mine')", DENIED),
    "takes precedence": ("import os; os.nice(-10)", DENIED),
    "starves its supervisor": (  # it then ended late, by seconds
        "import os\nfor n in range(5): os.fork() or exec('while True: pass')\n"
        "os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass", DENIED),
    # The signal may come between Python's look for signals and its wait: then the time limit ends the program.
    "ends its supervisor": ("import os, time; os.kill(1, 2); time.sleep(99)", "exit code 130|stopped after 8 s"),
    "stops its supervisor": ("import os; os.kill(1, 19); os.kill(1, 9); print('no use')", "^no use$"),
    "raises its limits": (
        "import resource as r\nfor limit in (r.RLIMIT_NPROC, r.RLIMIT_AS, r.RLIMIT_FSIZE, r.RLIMIT_CPU, r.RLIMIT_NOFILE):\n"
        "    try: r.setrlimit(limit, (r.RLIM_INFINITY, r.RLIM_INFINITY)); print('raised', limit)\n    except ValueError: pass",
        "nothing was printed"),
    "types into the terminal": ("import fcntl, termios\nfor n in (0, 1, 2): fcntl.ioctl(n, termios.TIOCSTI, b'x')", "Inappropriate ioctl"),
    "opens the terminal": ("import os; os.open('/dev/tty', os.O_RDWR)", MISSING),
    "bombs with forks": (
        "import os, time\nfor n in range(100):\n    try:\n        if os.fork() == 0: time.sleep(60)\n"
        "    except OSError as error: print(n, error); break", "^6 .*temporarily unavailable"),
    "bombs without counting": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "stopped after 1 s"),
    "bombs with threads": (
        "import threading\nfor n in range(100):\n    try: threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "    except RuntimeError as error: print(n, error); break", "^6 can't start new thread"),
    "takes memory": ("x = bytearray(2**30)", "MemoryError"),
    "takes it bit by bit": ("x = []\nwhile True: x.append(bytes(2**20))", "MemoryError"),
    "maps memory": ("import mmap; mmap.mmap(-1, 2**30)", r"\[Errno 12\]"),
    "takes memory by descriptor": ("import os; os.memfd_create('x')", DENIED),
    "takes memory that nobody owns": (CTYPES + "call(29, 0, 2**30, 0o1666)", "^-1 1$"),
    "shares memory": ("from multiprocessing.shared_memory import SharedMemory as S; S(create=True, size=9)", MISSING),
    "fills the disk": (
        "x = bytes(2**20)\nfor n in range(100):\n    try: open(str(n % 50), 'ab').write(x)\n    except OSError as e: print(n, e); break",
        "^64 .*No space left"),
    "writes a large file": (
        "f = open('a', 'wb')\nfor n in range(100):\n    try: f.write(bytes(2**20)); f.flush()\n    except OSError as e: print(n, e); break",
        "^16 .*File too large"),
    "makes a large file of nothing": ("open('a', 'wb').truncate(2**40)", "File too large"),
    "opens many files": ("x = [open('/code.py') for n in range(100)]", "Too many open files"),
    "dumps its core": ("import os; os.abort()", "exit code 134"),
    "loops": ("while True: pass", "stopped after 1 s. It wrote: nothing"),
    "sleeps": ("import time; print('soon', flush=True); time.sleep(999)", "stopped after 1 s. It wrote: soon"),
    "loops in children": ("import os\nos.fork()\nos.fork()\nwhile True: pass", "stopped after 1 s"),
    "ignores signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "while True: pass", "stopped after 1 s"),
    "stops itself": ("import os; os.kill(os.getpid(), 19)", "stopped after 1 s"),
    "closes its output": ("import os, time; os.close(1); os.close(2); time.sleep(999)", "stopped after 1 s. It wrote: nothing"),
    "prints 1 GB": ("for n in range(1000): print('x' * 10**6)", "stopped, because it wrote more than 100,000 bytes"),
    "prints 100 MB at once": ("print('x' * 100_000_000)", "stopped, because it wrote more than 100,000 bytes"),
    "complains at length": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "stopped, because it wrote more than 100,000 bytes"),
    "pretends to be the sandbox": ("print('bwrap: all is well')", "^bwrap: all is well$"),
    "runs 32-bit code": (  # mov eax, 20; int 0x80 (getpid); ret
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())", "exit code 159"),  # SIGSYS
    "calls by x32 numbers": (CTYPES + "call(0x40000000 + 39)", "exit code 159"),
}  # fmt: skip


@pytest.fixture(scope="module")
def contained():
    """Not to be tried in a sandbox that is none: `kill -1` would end the session of whoever runs the tests."""
    (observation,) = observe("import os; print(os.getpid(), os.listdir('/usr'), os.path.exists('/proc'))")
    assert re.fullmatch(r"2 \['bin', [^\]]*\] False\n", observation.text), observation.text


@needs_bubblewrap
@pytest.mark.parametrize("case", here(BOMBS))
def test_nothing_goes_off(case, contained, world, monkeypatch):
    """As above, for what would harm the machine of whoever runs the tests if it were tried outside the sandbox."""
    monkeypatch.setattr(tools, "_WALL_SECONDS", 1 if "stopped after 1 s" in BOMBS[case][1] else 8)
    program, answer = BOMBS[case]
    (observation,) = observe(world.fill(program))
    assert world.harm() == []
    assert re.search(answer, observation.text.strip()), observation.text


@needs_bubblewrap
def test_forbidden_system_calls_are_refused_one_by_one():
    """A filter with a wrong number or a wrong jump forbids something else, and nobody notices. The last one, getpid, is allowed."""
    numbers = [numbers[os.uname().machine == "aarch64"] for numbers in tools._FORBIDDEN.values()]
    (observation,) = observe(CTYPES + f"for number in {numbers}: call(number, -1, -1, -1, -1, -1, -1)\nprint(libc.getpid())")
    assert observation.text.split("\n") == ["-1 1"] * len(numbers) + ["2", ""]


# ---- many at once ----


@pytest.fixture
def two_at_once(monkeypatch):
    """A bound of two, whatever the machine. Gives how many ran as each program started."""
    beside, running, run_program = [], [], tools._run_program

    def run(code, stop):
        running.append(code)
        beside.append(len(running))
        try:
            return run_program(code, stop)
        finally:
            running.remove(code)

    monkeypatch.setattr(tools, "_run_program", run)
    monkeypatch.setattr(tools, "_FREE_CORES", threading.Semaphore(2))
    return beside


@needs_bubblewrap
def test_programs_wait_for_a_free_core_and_the_wait_does_not_count(two_at_once):
    """All of 128 at once took longer than 10 s, for they were in each other's way.

    Here: two event loops, one bound for both, and a tool that hands on to `python`, as an
    environment's does.
    """

    async def hands_on(code):
        return await tools.python(code)

    def six(tool):
        calls = [Call("python", {"code": "import time; time.sleep(0.6); print('ok')"})] * 6
        return asyncio.run(run_calls(calls, {"python": tool}, timeout=3))

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as loops:
        first, second = loops.map(six, [tools.python, hands_on])
    assert [o.text for o in first + second] == ["ok\n"] * 12
    assert time.perf_counter() - start > 3, "else nobody has waited for longer than the limit"
    assert max(two_at_once) == 2 and len(two_at_once) == 12


@needs_bubblewrap
def test_a_call_that_is_cancelled_while_it_waits_never_runs(two_at_once):
    async def scenario():
        programs = ["import time; time.sleep(60)"] * 2
        running = [asyncio.ensure_future(tools.python(program)) for program in programs]
        while len(two_at_once) < 2:
            await asyncio.sleep(0.02)
        call, tool = Call("python", {"code": "1"}), {"python": tools.python}
        waiting = asyncio.ensure_future(run_calls([call], tool, timeout=0.1))
        await asyncio.sleep(0.5)
        assert not waiting.done(), "its limit has not begun"
        for task in (waiting, *running):
            task.cancel()
        return await asyncio.gather(waiting, *running, return_exceptions=True)

    assert [type(outcome) for outcome in asyncio.run(scenario())] == [asyncio.CancelledError] * 3
    assert len(two_at_once) == 2


@needs_bubblewrap
def test_sandboxes_are_built_and_torn_down_beside_the_event_loop(monkeypatch):
    """Each took 60 ms of the loop's own thread: with 128 of them nothing else happened for 11 s."""
    threads = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            threads.append(threading.get_ident())
            super().__init__(*args, **options)

        def wait(self, timeout=None):
            threads.append(threading.get_ident())
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    assert observe("print(1)", "import time; time.sleep(60)", timeout=3)[0].text == "1\n"
    assert len(threads) == 4 and threading.get_ident() not in threads


@needs_bubblewrap
def test_the_limit_is_on_processor_time_and_a_wider_one_on_the_clock(monkeypatch):
    """A program that got half a processor was late by the clock, though not by its work."""
    monkeypatch.setitem(tools._LIMITS, "CPU", 1)
    loop = "print('a', flush=True)\nwhile True: pass"
    waits, works = observe("import time; time.sleep(1.5); print('ok')", loop)
    assert waits.text == "ok\n" and works.error
    assert "killed, as a program is after 1 s of processor time. It wrote: a" in works.text


# ---- the end of a call ----

STAY = "import os, sys\nfor n in range(3):\n    if os.fork() == 0:\n        os.setsid(); " + SLEEP + "\n" + SLEEP


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def children():
    """Of this process, the dead that nobody has waited for among them."""
    return {int(pid) for path in pathlib.Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@needs_bubblewrap
def test_an_abandoned_call_leaves_no_process_and_no_open_file(world):
    """run_calls gives up on a tool by cancelling it. A thread would run on; this kills what it began, also at the end of the loop."""
    before = os.listdir("/proc/self/fd"), children()
    start = time.monotonic()
    observations = observe(*[world.fill(STAY)] * 3, timeout=0.5)
    assert time.monotonic() - start < 3
    assert [o.text for o in observations] == ["error: python took longer than 0.5 s and was abandoned"] * 3
    assert world.left_behind() == [] and (os.listdir("/proc/self/fd"), children()) == before


@needs_bubblewrap
def test_while_it_runs_it_is_nobody_and_cancelling_ends_it_at_once(world):
    """Root is exempt from the limit on processes, whatever number it bears inside."""

    async def scenario():
        task = asyncio.ensure_future(tools.python(world.fill(STAY)))
        while len(world.left_behind()) < 4:
            await asyncio.sleep(0.02)
        users = {re.search(r"Uid:\t(\d+)\t(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text()).groups() for pid in world.left_behind()}
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return users

    uid = str(os.geteuid() or 65534)
    assert asyncio.run(scenario()) == {(uid, uid)}
    assert world.left_behind() == []


@needs_bubblewrap
def test_it_dies_with_us(world):
    """kill -9 leaves no time to clean up: a trainer that was killed left its programs running."""
    script = "import asyncio, sys, tools; asyncio.run(tools.python(sys.stdin.read()))"
    ours = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, cwd=world.names["repository"])
    ours.stdin.write(world.fill(STAY).encode()), ours.stdin.close()
    assert wait_for(lambda: len(world.left_behind()) == 4)
    ours.kill(), ours.wait()
    assert wait_for(lambda: world.left_behind() == [], seconds=2)


@needs_bubblewrap
def test_a_flood_is_not_kept_in_memory():
    """300 MB were read to the end before they were cut, in more than one sandbox."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KB
    observe("import os\nwhile True: os.write(1, bytes(2**20))")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000


# ---- no sandbox, no program ----


@pytest.mark.parametrize("missing", ["bwrap", "setpriv", "python3", "a machine whose system calls are known"])
def test_without_what_it_needs_it_refuses_and_says_what_to_install(missing, world, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **options: None if name == missing else which(name, **options) or "/bin/" + name)
    if "machine" in missing:
        monkeypatch.setattr(tools.platform, "machine", lambda: "riscv64")
    (observation,) = observe(world.fill("open('<folder>/new', 'w')"))
    assert observation == tools.Observation(
        "error: RuntimeError: model-written code runs in a sandbox only, and there is none here; the program was not run. "
        "On Debian (x86_64 or aarch64): apt-get install bubblewrap python3 util-linux", error=True)  # fmt: skip
    assert world.harm() == []


@needs_bubblewrap
def test_where_no_user_namespace_may_be_made_it_refuses(world):
    """As in many containers. Here: in a namespace of our own, in which no further one is allowed."""
    script = "import asyncio, sys, tools; print(asyncio.run(tools.run_calls([tools.Call('python', {'code': sys.argv[1]})], vars(tools))))"
    argv = ["bwrap", "--dev-bind", "/", "/", "--unshare-user", "--uid", "1000", "--disable-userns", sys.executable, "-c", script]
    argv += [world.fill("open('<folder>/new', 'w')")]
    out = subprocess.run(argv, capture_output=True, text=True, cwd=world.names["repository"])
    assert "(bubblewrap needs user namespaces), so the program was not run: bwrap: " in out.stdout and "error=True" in out.stdout, out
    assert world.harm() == []


def test_the_prompt_describes_the_tool_and_does_not_say_how_it_is_kept_in():
    described = schema(tools.python)["function"]
    assert " ".join(described["description"].split()) == (
        f"Run a Python program with the standard library, for at most {tools._LIMITS['CPU']} seconds. What it prints comes back. "
        "Each run starts afresh.")  # fmt: skip
    assert list(described["parameters"]["properties"]) == ["code"]


# ---- an environment whose tasks need it ----

CHAT = Chat(small_tokenizer(["what is the answer to the question"], 300))


def code(**options):
    """A factory, as `--env tests/code_env.py:Code` makes it."""
    settings = ",".join(f"{name}={value}" for name, value in options.items())
    return make_env(f"{code_env.__file__}:Code:{settings}")


def play(environment, seed, messages):
    agent = Agent(Script(CHAT, messages), CHAT, max_turns=3, max_new_tokens=1500, context=10**5)
    return asyncio.run(agent.run(environment, seed))


def solve(task):
    """The program that a reader of the question would write."""
    numbers = re.findall(r"\d+", task)
    if "power" in task:
        return "print(sum(int(digit) for digit in str({} ** {})))".format(*numbers)
    if "add up to" in task:
        _, n, total = numbers
        return f"print(len([x for x in range(1, {n} + 1) if sum(map(int, str(x))) == {total}]))"
    digit, _, n = numbers
    return f"print(''.join(map(str, range({n} + 1))).count('{digit}'))"


def test_the_environment_fits_the_interface():
    check_env(code())
    assert demonstrator(code()).__name__ == "demonstrate_code"
    environment = code()()
    tasks = {environment.reset(seed) for seed in range(400)}
    assert len(tasks) > 390 and 0.14 < sum(split(task) != "train" for task in tasks) / len(tasks) < 0.26
    with pytest.raises(EnvError, match="largest must be at least 1000"):
        code(largest=10)()


@needs_bubblewrap
def test_who_writes_the_program_succeeds():
    environment = code()()
    for seed in range(12):
        program = solve(environment.reset(seed))
        printed = asyncio.run(environment.python(program))
        episode = play(environment, seed, [format_call("python", code=program), printed])
        assert (episode.reward, episode.finish, episode.tool_errors) == (1.0, "answered", 0), environment.reset(seed)
        assert episode.behaviour == {"programs": 1}


@needs_bubblewrap
def test_its_demonstrator_is_mostly_wrong():
    """And says what its programs print: what is imitated must be possible."""
    environment, rewards = code()(), []
    for seed in range(300):
        environment.reset(seed)
        messages = list(demonstrator(code())(environment, Random(seed)))
        rewards.append(messages[-1] == environment._answer)
        if seed < 10 and len(messages) == 2:
            (call,) = parse(messages[0], [schema(environment.python)]).calls
            assert asyncio.run(environment.python(**call.arguments)).strip() == messages[1]
            assert play(environment, seed, messages).reward == rewards[-1]
    assert 0.2 < sum(rewards) / 300 < 0.45


def test_no_number_of_the_question_and_no_broken_tool_is_of_use():
    environment = code(tool=0)()
    tasks = [environment.reset(seed) for seed in range(100)]
    answers = [environment.reset(seed) and environment._answer for seed in range(100)]
    assert sum(answer in re.findall(r"\d+", task) for task, answer in zip(tasks, answers)) < 3
    episode = play(environment, 0, [format_call("python", code=solve(environment.reset(0))), "out of order"])
    assert episode.reward == 0 and environment.state == solve(environment.reset(0))
