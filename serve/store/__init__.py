"""The record of adverts: jobs, their variants, what models were asked about them, and the events these lead to.

A transaction is a function that may run more than once. If the database is unreachable, or another transaction changes
the same row first, `Database.write` repeats it from the start. So its caller gives it the ids of what it creates.
"""
