"""Long runs that show what holds under load, faults and hostile input: ``make endurance``."""
