"""Stage two: distributions over the codes of stage one."""
