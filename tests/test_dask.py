"""Studies on a Dask cluster: the tables of a local grid, byte for byte, whatever happens to a worker."""

import os
import threading
import time

from distributed import LocalCluster

from clseg.tools import cli

QUIET = {"dashboard_address": None, "threads_per_worker": 1, "processes": True}


def run(small_grid, root, scheduler, monkeypatch, *more):
    monkeypatch.setenv("CLSEG_OUT", str(root))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return cli.main([*small_grid.words, "--scheduler", scheduler, *more])


def test_two_workers_leave_the_tables_of_a_local_grid(small_grid, whole, tmp_path, monkeypatch):
    with LocalCluster(n_workers=2, **QUIET) as cluster:
        assert run(small_grid, tmp_path, cluster.scheduler_address, monkeypatch) == 0
    assert small_grid.tables(tmp_path) == small_grid.tables(whole[0])
    assert len(small_grid.folders(tmp_path)) == 3


def test_the_run_of_a_lost_worker_is_done_again(small_grid, whole, tmp_path, monkeypatch):
    lost = []

    def lose_one(cluster):
        while not (folders := list(tmp_path.glob("runs/phantom/smoke/pretrain-*/notebook.running.ipynb"))):
            time.sleep(0.05)
        worker = next(state for state in cluster.scheduler.workers.values() if state.processing)
        lost.extend(folders)
        os.kill(next(nanny.pid for nanny in cluster.workers.values() if nanny.worker_address == worker.address), 9)

    with LocalCluster(n_workers=2, resources={"GPU": 1}, **QUIET) as cluster:
        killer = threading.Thread(target=lose_one, args=(cluster,), daemon=True)
        killer.start()
        assert run(small_grid, tmp_path, cluster.scheduler_address, monkeypatch) == 0
    assert lost
    assert small_grid.tables(tmp_path) == small_grid.tables(whole[0])


def test_a_scheduler_that_is_not_there_is_a_wrong_request(small_grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clseg.study.grid.CONNECT_SECONDS", 1)
    assert run(small_grid, tmp_path, "tcp://127.0.0.1:9", monkeypatch) == 2
    assert "--scheduler tcp://127.0.0.1:9: no Dask scheduler answers there" in capsys.readouterr().err
    assert run(small_grid, tmp_path, "nonsense://x", monkeypatch) == 2
    assert "start one with `dask scheduler`" in capsys.readouterr().err


def test_workers_with_other_code_are_refused(small_grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clseg.study.grid.CODE", "another")
    with LocalCluster(n_workers=1, **QUIET) as cluster:
        assert run(small_grid, tmp_path, cluster.scheduler_address, monkeypatch) == 2
    assert "has other code of clseg; give all workers the same" in capsys.readouterr().err
