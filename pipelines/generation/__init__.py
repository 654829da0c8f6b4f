"""Any number of samples: what each is, where it lies, and who makes what is missing."""
