"""Will it fit, and how long will it take: memory, time, a random model of a real shape, a rehearsal."""
