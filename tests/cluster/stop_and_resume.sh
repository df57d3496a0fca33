# Run a study by the sbatch file, stop it in the middle as Slurm does before the time is up, and run it again to its end.
script=$1
space=$2
job=$(sbatch --parsable --gpus-per-node=2 "$script" "$space")
until grep -q "trial 1:" "autotune-$job.log" 2> /dev/null; do
    squeue --noheader --job "$job" | grep -q . || { cat "autotune-$job.log"; exit 1; }
    sleep 0.5
done
scancel --signal=TERM --batch "$job"
while squeue --noheader --job "$job" 2> /dev/null | grep -q .; do sleep 0.5; done
cp "$space" first-space.yaml
sed -i 's/trials: 100/trials: 4/' "$space"
sbatch --wait --gpus-per-node=2 "$script" "$space"
