"""Asks who answers, from an event loop: asyncio_client.py ADDRESS PORT"""

import asyncio
import sys


async def main():
    reader, writer = await asyncio.open_connection(sys.argv[1], int(sys.argv[2]))
    writer.write(b"who\n")
    print((await reader.readline()).decode().strip())
    writer.close()
    await writer.wait_closed()


asyncio.run(asyncio.wait_for(main(), 5))
