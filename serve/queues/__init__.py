"""Who may begin, who waits, and who is to come back when: bounded queues in good order, for the whole cluster."""
