"""Pipeline parallelism: schedules as data, simulated, drawn."""
