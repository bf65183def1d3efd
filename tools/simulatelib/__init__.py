"""Power cuts, simulated: what the engine asks of its files is recorded, and for any moment of the record disks are made
as a power cut then may leave them. Each is opened by the real engine and held against what had been answered.

    record.py     Recorder: the engine's Files, which notes every call in one log
    disk.py       what a disk may hold after the first N events of the log, and one such disk as files
    oracle.py     what was answered when, and what a recovered pool may therefore be
    watched.py    the engine's Pool, which tells the oracle of commands and commits
    work.py       seeded work on the synchronous engine, with more work inside its syncs, checkpoints and copies
    livework.py   the same through LivePool: an event loop, its threads, concurrent writers
    directed.py   short histories, one an operation, to be cut at every event
    judge.py      opens a disk and compares
    run.py        work, cuts, judgement, and what to type to see a failure again
"""
