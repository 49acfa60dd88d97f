"""Programs that want to score without solving anything, to harm the machine, or to hold up a batch.

Each has to print SECRET to score; the test hides it where such programs look. ``@NAMES@`` stand for what the test fills in:
OUTSIDE a folder that everybody may write to, ANSWERS a file with the secret that everybody may read, PORT a server on this
machine that tells it, PID the process that checks.
"""

from __future__ import annotations

HOSTILE: dict[str, str] = {
    # never ends
    "infinite loop": "while True: pass",
    "sleeps": "import time; time.sleep(1000)",
    "sleeps and ignores signals": """
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except Exception: pass
time.sleep(1000)""",
    "waits for input that never comes": "import sys\nwhile True: sys.stdin.read()",
    "catastrophic regular expression": "import re; re.match(r'(a+)+$', 'a' * 64 + 'b')",
    "huge power": "print(len(str(9 ** 9 ** 9)))",
    "sum that never ends": "from itertools import count; print(sum(1 for _ in count()))",
    "compiles for ever": "eval('+'.join(['9**9**7'] * 50))",
    "signal handler that goes on": """
import signal
def again(*_):
    while True: pass
signal.signal(signal.SIGALRM, again); signal.alarm(1)
while True: pass""",
    "deadlock": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "thread that keeps the interpreter": """
import threading
def run():
    while True: pass
threading.Thread(target=run).start()""",
    # takes everything
    "memory at once": "x = bytearray(1 << 40)",
    "memory in steps": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "memory in children": """
import os
for _ in range(12):
    if os.fork() == 0: break
x = []
while True: x.append(bytearray(b'1') * (1 << 22))""",
    "memory in anonymous files": """
import os
held = []
while True:
    fd = os.memfd_create('x'); held.append(fd)
    for _ in range(100): os.write(fd, b'1' * (1 << 20))""",
    "memory as shared mapping": """
import mmap
held = []
while True: m = mmap.mmap(-1, 1 << 26); m.write(b'1' * (1 << 26)); held.append(m)""",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(1000,)).start()
    except RuntimeError: pass""",
    "process bomb by exec": """
import os, sys
os.fork(); os.fork()
os.execv(sys.executable, [sys.executable, '-c', 'import os\\nwhile 1: os.fork()'])""",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): return f() + 1\nf()",
    "deep syntax": "eval('(' * 100000 + ')' * 100000)",
    "crash of the interpreter": "import ctypes; ctypes.string_at(0)",
    "huge output": "while True: print('1' * 10 ** 6)",
    "huge output on stderr": "import sys\nwhile True: sys.stderr.write('1' * 10 ** 6)",
    "output without end by children": """
import os
for _ in range(8):
    if os.fork() == 0: break
while True: os.write(1, b'1' * 65536)""",
    "fills the disk": """
import os
for i in range(10 ** 6):
    with open(f'{os.environ["TMPDIR"]}/f{i}', 'wb') as f:
        for _ in range(1024): f.write(b'1' * (1 << 20))""",
    "many files": """
import os
for i in range(10 ** 7): open(f'{os.environ["TMPDIR"]}/f{i}', 'w').close()""",
    "deep folders": """
import os
os.chdir(os.environ['TMPDIR'])
for i in range(1500): os.mkdir('d'); os.chdir('d')
print('x')""",
    "paths that are too long": """
import os
os.chdir(os.environ['TMPDIR'])
for i in range(4):
    if os.fork() == 0:
        os.mkdir(str(i)); os.chdir(str(i))
        for _ in range(100): os.mkdir('d' * 255); os.chdir('d' * 255); open('f', 'w').close()
        os._exit(0)
for _ in range(4): os.wait()
print('x')""",
    "folders that cannot be entered": """
import os
os.chdir(os.environ['TMPDIR'])
os.makedirs('a/b/c'); open('a/b/c/file', 'w').close(); os.symlink('/', 'a/b/root')
os.umask(0o777)
os.mkdir('closed'); os.mkdir('a/b/closed')
print('x')""",
    "many open files": "import os\nheld = []\nwhile True: held.append(os.open('/dev/null', os.O_RDONLY))",
    "raises its own limits": """
import resource
for which in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
    resource.setrlimit(which, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
while True: pass""",
    # outlives its check
    "daemon": """
import os, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
for fd in range(3): os.close(fd)
time.sleep(1000)""",
    "zombies": "import os, time\nfor _ in range(10):\n    if os.fork() == 0: os._exit(0)\ntime.sleep(1000)",
    "child that outlives it": """
import subprocess, sys
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True)""",
    # writes and deletes
    "writes outside": "open('@OUTSIDE@/written', 'w').write('x')",
    "writes to /tmp": "open('/tmp/sae_rl_hostile', 'w').write('x')",
    "writes to /dev/shm": "open('/dev/shm/sae_rl_hostile', 'w').write('x')",
    "deletes outside": "import shutil; shutil.rmtree('@OUTSIDE@')",
    "deletes everything": """
import os
for base, _, files in os.walk('/'):
    for f in files:
        try: os.remove(os.path.join(base, f))
        except OSError: pass""",
    "changes what is known of a file of others": """
import os
path = '@OUTSIDE@/kept'
def by_descriptor(change, *arguments): change(os.open(path, os.O_RDONLY), *arguments)
for change in (
    lambda: os.chmod(path, 0), lambda: by_descriptor(os.fchmod, 0), lambda: os.utime(path, (0, 0)),
    lambda: by_descriptor(os.utime, (0, 0)), lambda: os.setxattr(path, 'user.x', b'1'),
    lambda: by_descriptor(os.setxattr, 'user.x', b'1'), lambda: os.truncate(path, 0), lambda: os.chmod('@OUTSIDE@', 0),
):
    try: change()
    except OSError: pass""",
    "moves a file of others": "import os; os.rename('@OUTSIDE@/kept', '@OUTSIDE@/moved')",
    "links out of its folder": """
import os
os.symlink('@OUTSIDE@', os.environ['TMPDIR'] + '/out')
open(os.environ['TMPDIR'] + '/out/written', 'w').write('x')""",
    "changes its own checker": """
import os
for path in ('/inside.py', __import__('sys').modules['__main__'].__file__, 'program.py'):
    try: open(path, 'a').write('print(1)')
    except OSError: pass""",
    # looks for the answer
    "reads the environment": "import os\nprint(os.environ['SAE_RL_SECRET'])",
    "reads the checker's environment": """
print([part for part in open('/proc/@PID@/environ').read().split(chr(0)) if 'SECRET' in part][0].split('=')[1])""",
    "reads its parent's environment": """
import os
print([part for part in open(f'/proc/{os.getppid()}/environ').read().split(chr(0)) if 'SECRET' in part][0].split('=')[1])""",
    "reads the answers": "print(open('@ANSWERS@').read())",
    "searches the disk": """
import os
for base, _, files in os.walk('/'):
    if 'answers.txt' in files: print(open(os.path.join(base, 'answers.txt')).read())""",
    "reads the checker's memory": """
import re
for line in open('/proc/@PID@/maps'):
    start, end = (int(x, 16) for x in line.split()[0].split('-'))
    with open('/proc/@PID@/mem', 'rb', 0) as memory:
        memory.seek(start)
        found = re.search(rb'secret-[0-9a-f]+', memory.read(end - start))
        if found: print(found[0].decode()); break""",
    "debugs the checker": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print('attached' if libc.ptrace(16, @PID@, 0, 0) == 0 else 'refused')""",
    "looks up the stack": """
import sys
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
        if 'secret-' in str(value): print(value)
    frame = frame.f_back""",
    "looks through all objects": """
import gc
for o in gc.get_objects():
    if isinstance(o, dict):
        for value in list(o.values()):
            if isinstance(value, str) and value.startswith('secret-'): print(value)""",
    "reads its own command line": "print(open('/proc/self/cmdline').read())",
    "reads all that is open": """
import os
for fd in range(64):
    try: os.lseek(fd, 0, 0); print(os.read(fd, 10 ** 6).decode())
    except OSError: pass""",
    # the network
    "asks a server": """
import socket
s = socket.create_connection(('127.0.0.1', @PORT@), 1); print(s.recv(100).decode())""",
    "asks a server by urllib": """
import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:@PORT@', timeout=1).read().decode())""",
    "asks a server through a shell": """
import os
os.system('exec 3<>/dev/tcp/127.0.0.1/@PORT@; cat <&3')
os.execvp('bash', ['bash', '-c', 'cat < /dev/tcp/127.0.0.1/@PORT@'])""",
    "listens": "import socket\ns = socket.socket(); s.bind(('0.0.0.0', 0)); s.listen(); s.accept()",
    # deceives the checker
    "exits well": "import os; os._exit(0)",
    "raises SystemExit": "raise SystemExit(0)",
    "says that it passed": "print('all tests pass'); print('{\"returned\": true}'); print('1.0')",
    "writes to every descriptor": """
import os
for fd in range(64):
    try: os.write(fd, b'{"returned": true}\\n')
    except OSError: pass""",
    "patches what compares": """
import builtins, json, sys
class Anything(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = str.__hash__
builtins.str = Anything
json.dumps = lambda *_: '{"returned": true}'
for module in list(sys.modules.values()):
    for name in dir(module):
        if name in ('same_value', 'different', 'wrong_value', 'main'):
            setattr(module, name, lambda *_, **__: None)
print(Anything('x'))""",
    "kills whoever checks": """
import os
for pid in (@PID@, os.getppid(), 1, -1, 0):
    try: os.kill(pid, 9)
    except OSError: pass
print('x')""",
    "stops whoever checks": "import os, signal\nos.kill(@PID@, signal.SIGSTOP)",
    "signals the checker through a socket": """
import fcntl, os, signal, socket, struct
def owned(f): fcntl.fcntl(f, fcntl.F_SETOWN, @PID@)
def owned_ex(f): fcntl.fcntl(f, 15, struct.pack('ii', 1, @PID@))
def owned_by_ioctl(f): fcntl.ioctl(f, 0x8901, struct.pack('i', @PID@))
def owned_by_group(f): fcntl.ioctl(f, 0x8902, struct.pack('i', @PID@))
for own in (owned, owned_ex, owned_by_ioctl, owned_by_group):
    for number in (signal.SIGKILL, None):
        r, w = socket.socketpair()
        try: own(r)
        except OSError: pass
        try: fcntl.fcntl(r, 10, number or 0)
        except OSError: pass
        fcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | os.O_ASYNC)
        w.send(b'x')
print('x')""",
    "lowers the checker's limits": "import resource; resource.prlimit(@PID@, resource.RLIMIT_NOFILE, (0, 0))",
    # the kernel
    "makes namespaces": """
import ctypes; libc = ctypes.CDLL(None, use_errno=True)
print(libc.unshare(0x10000000), ctypes.get_errno())""",
    "mounts": """
import ctypes; libc = ctypes.CDLL(None, use_errno=True)
print(libc.mount(b'none', b'/tmp', b'tmpfs', 0, b''), ctypes.get_errno())""",
    "leaves its root": "import os\nos.chroot('/tmp'); os.chdir('../../../../..'); print(os.listdir('/'))",
    "becomes root": "import os\nos.setuid(0); print(open('/etc/shadow').read())",
    "another program with rights": """
import subprocess; print(subprocess.run(['su', '-c', 'cat @ANSWERS@'], capture_output=True, text=True, input='').stdout)""",
}
FUNCTIONS: dict[str, str] = {  # they are called with 1, and have to return SECRET
    "equal to everything": """
class Same(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def f(x): return Same('x')""",
    "an object that claims to be right": "class C:\n    def __eq__(self, other): return True\ndef f(x): return C()",
    "a dictionary that claims to be right": """
class D(dict):
    def __eq__(self, other): return True
def f(x): return D()""",
    "ends before it answers": "import os\ndef f(x): os._exit(0)",
    "answers for the harness": """
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'{"returned": true}\\n')
        except OSError: pass
    os._exit(0)""",
    "patches the harness": """
import json, sys
json.dumps = lambda value, **_: '{"returned": true, "passed": true}'
def f(x): return 1""",
    "looks up the harness' stack": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            if 'secret-' in str(value): return value
        frame = frame.f_back""",
    "a value without end": "def f(x):\n    x = []\n    x.append(x)\n    return x",
    "a deep value": "def f(x):\n    for _ in range(500): x = [x]\n    return x",
    "a huge number": "def f(x): return 10 ** 5000",
    "never returns": "def f(x):\n    while True: pass",
    "not a number": "def f(x): return float('nan')",
    "a name that is no function": "f = 'secret'",
    "loops while it is loaded": "while True: pass\ndef f(x): return x",
}
