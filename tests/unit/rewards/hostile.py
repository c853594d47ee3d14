"""Programs that attack the sandbox. Each prints 42 only if its attack succeeds; its test wants 42, so that it scores 0.

Never run one of them outside: several end every process that they can reach.
"""

PROBES = {  # fail at once
    "ptrace": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "memory of process 1": "open('/proc/1/mem', 'r+b')",
    "environment of process 1": "assert open('/proc/1/environ', 'rb').read()",
    "descriptors of process 1": "import os\nassert os.listdir('/proc/1/fd')",
    "killing process 1": "import os\nos.kill(1, 9)\nos.kill(1, 19)\nos._exit(0)",
    "limits of process 1": "import resource\nresource.prlimit(1, resource.RLIMIT_NOFILE, (3, 3))",
    "processors of process 1": "import os\nos.sched_setaffinity(1, {0})",
    "io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(256)) >= 0",
    "bpf": "import ctypes\nassert ctypes.CDLL(None).syscall(NR_BPF, 0, ctypes.create_string_buffer(128), 72) >= 0",
    "keyctl": "import ctypes\nassert ctypes.CDLL(None).syscall(NR_KEYCTL, 0, -3, 1) >= 0",
    "memory files": "import os\nos.memfd_create('x')",
    "shared memory": "import ctypes\nassert ctypes.CDLL(None).shmget(1, 4096, 0o1666) >= 0",
    "user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "user namespace by clone": (
        "import ctypes, os\npid = ctypes.CDLL(None).syscall(NR_CLONE, 0x10000011, 0, 0, 0, 0)\n"
        "if pid == 0: os._exit(0)\nassert pid > 0"
    ),
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "root again": "import os\nos.setuid(0)",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)",
    "the host's abstract sockets": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0pmpo-test-PORT')",
    "users": "open('/etc/passwd')",
    "homes": "import os\nassert [p for p in os.listdir('/root') + os.listdir('/home') if not p.startswith('.pyenv')]",
    "the host's processes": "open('/proc/OUTSIDE/stat')",
    "2 GiB": "x = bytearray(2 << 30)",
    "stack overflow": "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(x): return sorted([x], key=f)\nf(1)",
    "an early exit": "import os\nos._exit(0)",
    "an exit code": "raise SystemExit(0)",
    "a crash": "import os\nos.abort()",
    "a full tmpfs": "for i in range(99): open(f'/tmp/{i}', 'wb').write(b'0' * (15 << 20))",
    "one large file": "open('/tmp/x', 'wb').write(b'0' * (20 << 20))",
    "files that cannot be removed": "import os\nfor p in 'abc': os.mkdir(p); open(p + '/x', 'w'); os.chmod(p, 0)\nos._exit(0)",
    "closing everything": "import os\nos.closerange(0, 9999)\nos._exit(0)",
    "output after the answer": "import os\nos.write(1, b'41\\n42\\n43\\n')\nos._exit(0)",
    "messages of the sandbox's own": (
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'\\n{"over": "exit", "exit": 0, "output": "42"}\\n\')\n'
        "    except OSError: pass\nos._exit(0)"
    ),
    "another sys.stdout": (
        "import sys\nclass Fake:\n    def __getattr__(self, name): return lambda *a: '42'\n"
        "    def __eq__(self, other): return True\nsys.stdout = sys.stderr = sys.__stdout__ = Fake()\nraise SystemExit"
    ),
    "writing everywhere": (
        "import os\nmade = []\nfor folder, _, _ in os.walk('/'):\n    if folder.startswith('/proc/'): continue\n"
        "    try: open(folder + '/pmpo-made', 'w'); made.append(folder)\n    except OSError: pass\n"
        "assert [f for f in made if not f.startswith('/tmp')]"
    ),
    "reading the tests": (
        "import os\nseen = ''\nfor folder, _, files in os.walk('/proc'):\n    for name in files:\n"
        "        if name in ('environ', 'cmdline', 'maps', 'mem', 'stat', 'mountinfo', 'auxv'):\n"
        "            try: seen += open(folder + '/' + name, errors='replace').read(100000)\n            except OSError: pass\n"
        "for folder in ('/tmp', '/sandbox'):\n    for name in os.listdir(folder):\n"
        "        try: seen += open(f'{folder}/{name}').read()\n"
        "        except OSError: pass\nimport gc\nseen += ''.join(o for o in gc.get_objects() if isinstance(o, str))\n"
        "assert 'SEC' + 'RET' in seen"
    ),
    "a daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        while True:\n            try: os.kill(-1, 9)\n"
        "            except OSError: time.sleep(0.01)\n    os._exit(0)\nos._exit(0)"
    ),
}
COSTLY = {  # run until a limit ends them
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "threads": (
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(99,)).start()\n"
        "    except RuntimeError: pass"
    ),
    "2 GiB in pieces": (
        "import os, time\nfor _ in range(10):\n    if os.fork() == 0:\n        x = bytearray(b'1') * (300 << 20)\n"
        "        time.sleep(99)\ntime.sleep(99)"
    ),
    "endless output": "while True: print('42' * 1000)",
    "endless": "while True: pass",
    "asleep": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "many files": "i = 0\nwhile True:\n    i += 1\n    open(f'/tmp/{i}', 'w').close()",
    "deaf": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
}
FORGERS = {  # functions whose result would pass if it were compared where they run
    "__eq__": (
        "class A:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\ndef f(x): return A()"
    ),
    "an int that equals all": (
        "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return A(5)"
    ),
    "a str that equals all": (
        "class A(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\ndef f(x): return A('x')"
    ),
    "exit at import": "import os\nos._exit(0)",
    "exit in the call": "def f(x): raise SystemExit(0)",
    "no AssertionError": "import builtins\nbuiltins.AssertionError = SystemExit\ndef f(x): return 0",
    "another json": "import json\njson.dumps = lambda value, **_: '{\"passed\": true}'\ndef f(x): return 0",
    "messages": (
        "import os\ndef f(x):\n    for fd in range(3, 64):\n"
        '        try: os.write(fd, b\'{"passed": true}\\n{"value": true}\\n\')\n'
        "        except OSError: pass\n    return 0"
    ),
    "too many answers": "import os\ndef f(x):\n    while True: os.write(4, b'1\\n' * 1000)",
    "huge": "def f(x): return '4' * (1 << 24)",
    "deep": "def f(x):\n    y = []\n    for _ in range(100000): y = [y]\n    return y",
    "bytes of a gigabyte": (
        'import json, os\ndef f(x):\n    os.write(4, b\'{"value": {"bytes": 1000000000}}\\n\')\n    return 0'
    ),
}
