package faults

import "syscall"

var endWithTests = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
