"""Asks who answers, over a blocking socket: blocking.py ADDRESS PORT"""

import socket
import sys

with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5) as s:
    peer = s.getpeername()
    if peer[:2] != (sys.argv[1], int(sys.argv[2])):
        sys.exit(f"getpeername says {peer}")
    s.sendall(b"who\n")
    print(s.makefile().readline().strip())
