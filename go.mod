module requestcount

go 1.25
