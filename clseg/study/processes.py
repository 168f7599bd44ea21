"""What processes that work for another have in common."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """From now on this process ends when the one that started it ends, whatever happens to that one."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
