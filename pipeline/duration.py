"""Format durations for people to read."""


def duration(seconds: float) -> str:
    """Format a number of seconds by its two largest units: "13 s", "2 min 05 s" or "1 h 02 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
