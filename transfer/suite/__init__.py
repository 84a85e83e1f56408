"""detco-suite: every weights x task x seed of a suite file, resumable. Needs no Detectron2; the runs it starts do."""
