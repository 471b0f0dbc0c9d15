"""Several processes for one step: torchrun under this supervisor, on one machine or on several.

wire        authenticated messages between the launchers of a run's machines
nodes       who they are, and whether they are still there
reports     what each process says of itself, in files of the attempt's folder
group       the processes of one machine: started, watched, ended to the last
supervise   one run from the first process to the result, on the machine that has the step
preflight   (torch) whether the processes reach each other, before the model is loaded
torchrun    (torch) torch's launcher; writes down which process failed

The supervisor imports no torch: it lives as long as the step, and holds no memory that training wants.
`python -m tuneloop.steps.launch --join HOST:PORT` is what the other machines of a run keep running.
"""
