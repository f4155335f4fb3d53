"""Decides every step: what runs, on which ranks, over which pages.

`scheduler.Scheduler` is a pure state machine: requests, aborts and results go in; plans and tokens
come out. It has no clock, no socket, no thread and no torch, so a simulator or a test drives it as
`process` does.
"""
