"""The record of adverts: jobs, their variants, what models were asked about them, and the events that follow.

A transaction is a function that may be called again: where the database was not there, or another changed the same
row first, `Database.write` takes it again from the start. So each takes the ids of what it makes from its caller.
"""
