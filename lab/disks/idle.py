"""Many null disks, each served by a process of its own: idle.py NUMBER, until SIGTERM."""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ublk

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
servers = []
for _ in range(int(sys.argv[1])):
    servers.append(os.fork())
    if servers[-1] == 0:
        with ublk.Device(ublk.Null(), partition_scan=False) as disk:
            print(disk.path, flush=True)
            signal.sigwait([signal.SIGTERM])
        os._exit(0)
signal.sigwait([signal.SIGTERM])
for server in servers:
    os.kill(server, signal.SIGTERM)
for server in servers:
    os.waitpid(server, 0)
